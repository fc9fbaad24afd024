#!/usr/bin/env bash
# Test and measure asda on a CUDA machine: is everything right there, and how fast is it? See docs/gpu.md, or --help.
set -euo pipefail
here="$(cd "$(dirname "$0")/.." && pwd)"
python="${PYTHON:-$here/.venv/bin/python}"
[ -x "$python" ] || python=python3
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" "$here/tools/bench/gpu_day.py" "$@"
