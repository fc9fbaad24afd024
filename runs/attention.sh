#!/usr/bin/env bash
# How much attention falls on foreign sound, with lambda 0, 0.1, 0.3, 0.5 and learned: the teachers of runs/ablations.sh, three
# seeds each. The measure: docs/attention_measure.md. Tables: docs/results.md.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
for seed in 1 2 3; do
    networks=()
    for name in one_map lambda_0 base lambda_0.3 lambda_0.5 lambda_learned; do networks+=("runs/exp/$name-$seed"); done
    python tools/attention.py "${networks[@]}" --data "shards/esc10:${ESC10_FOLDS//,/+}" --clips 128 --seed "$seed" \
        --out "runs/exp/attention-$seed.json" | tee "runs/exp/attention-$seed.txt"
done
