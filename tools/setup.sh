#!/usr/bin/env bash
# Make .venv from the lock: exact versions, checked hashes. Does nothing if it is up to date.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { printf 'setup: %s\n' "$1" >&2; exit 2; }

python=""
for candidate in "${PYTHON:-}" python3 python3.14 python3.13 python3.12 python3.11; do
    if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
[ -n "$python" ] || fail "asda needs Python 3.11 to 3.14; install one (apt install python3 python3-venv) or name it: make setup PYTHON=/path/to/python3"
"$python" -c 'import ensurepip, venv' 2>/dev/null || fail "$python has no venv module; install it: apt install python3-venv"
[ "$(uname -sm)" = "Linux x86_64" ] || fail "the lock is for Linux on x86_64, this is $(uname -sm)"

stamp=.venv/.made-from
current=$(cat requirements-build.lock requirements.lock pyproject.toml | sha256sum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$current" ]; then
    exit 0
fi

free_kib=$(df -Pk . | awk 'NR == 2 { print $4 }')
[ "$free_kib" -gt $((9 * 1024 * 1024)) ] || fail "making the environment takes about 9 GiB of disk, and $((free_kib / 1024)) MiB are free here"

echo "setup: making .venv from requirements.lock (about 2.5 GB to download, 6 GB on disk, 2 to 5 minutes)"
rm -rf .venv
"$python" -m venv .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check --quiet "$@"; }
pip install --require-hashes -r requirements-build.lock
# DeepSpeed comes as source; without build isolation it is built from the locked packages alone.
pip install --require-hashes --no-build-isolation -r requirements.lock
pip install --no-deps --no-build-isolation --editable .
printf '%s\n' "$current" > "$stamp"
echo "setup: done"
