# Functions for the scripts beside this one. Each runs in the checkout, resumes if it was stopped, and does nothing once all
# is finished. JOBS trainings run at a time, one core each; the default is JOBS=2.
#
#   AUDIO=../shared/data bash runs/transfer.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mkdir -p runs/exp
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1
AUDIO=${AUDIO:-../shared/data}
JOBS=${JOBS:-2}
ESC10_FOLDS=fold1,fold2,fold3,fold4
UNLABELLED='{"data":"shards/pile:train","share":0.8},{"data":"shards/esc50x:fold1+fold2+fold3+fold4","share":0.2}'

# shards NAME TABLE [options]: a dataset of shards from a table, once
shards() {
    [ -f "shards/$1/dataset.json" ] || asda shards --source csv --input "$AUDIO/$2" --out "shards/$1" "${@:3}"
}

all_shards() {
    shards pile pile/pile.csv --no-labels
    for task in esc10 esc50x us8k; do shards "$task" env/env.csv --where "task=$task"; done
    for words in speech_commands arabic_sc; do shards "$words" kws/kws.csv --where "source=$words"; done
}

# beside COMMAND...: run in the background, at most JOBS at a time; failures print their own message
beside() {
    while [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; do wait -n || true; done  # 127: it ended meanwhile
    "$@" &
}

# train NAME CONFIG [overrides]: one training in runs/NAME, in the background
train() {
    [ -e "runs/$1/finished" ] || beside train_now "$@"
}

train_now() {
    echo "runs/$1"
    mkdir -p "runs/$1"
    python asda/train.py --config "configs/$2.json" "run.folder=runs/$1" run.keep=1 "${@:3}" >> "runs/$1/log.txt" 2>&1 \
        && touch "runs/$1/finished" || echo "runs/$1 has not finished; see runs/$1/log.txt" >&2
}

# crossval NAME CONFIG DATA SPLITS SEEDS [arguments]: cross-validation in runs/NAME
crossval() {
    asda crossval --config "configs/$2.json" --data "shards/$3" --hold-out "$4" --seeds "$5" --jobs "$JOBS" \
        --out "runs/$1" run.keep=1 run.eval_every=100000 run.save_every=100000 "${@:6}" | tee "runs/$1.txt"
}

# probe NAME [arguments]: evaluate frozen features once, in runs/exp/probe-NAME.json
probe() {
    [ -f "runs/exp/probe-$1.json" ] || asda probe --out "runs/exp/probe-$1.json" "${@:2}" | tee "runs/exp/probe-$1.txt"
}
