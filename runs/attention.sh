#!/usr/bin/env bash
# How much attention falls on foreign sound, with one map and with lambda 0, 0.1, 0.3, 0.5 and learned, three seeds each: the
# teachers of runs/ablations.sh on all clips of ESC-10, and the networks fine-tuned from them on the held-out fold 4.
# The measure: docs/attention_measure.md. Tables: docs/results.md.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# measure NAME DATA CLIPS RUN...
measure() {
    [ -f "runs/exp/$1.json" ] || asda attention "${@:4}" --data "$2" --clips "$3" --seed "$seed" \
        --out "runs/exp/$1.json" | tee "runs/exp/$1.txt"
}

for seed in 1 2 3; do
    pretrained=() tuned=()
    for name in one_map lambda_0 base lambda_0.3 lambda_0.5 lambda_learned; do
        pretrained+=("runs/exp/$name-$seed") tuned+=("runs/exp/esc10-$name/fold4-seed$seed")
    done
    measure "attention-$seed" "shards/esc10:${ESC10_FOLDS//,/+}" 128 "${pretrained[@]}"
    measure "attention-tuned-$seed" shards/esc10:fold4 80 "${tuned[@]}"
done
