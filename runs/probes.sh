#!/usr/bin/env bash
# Frozen features, without fine-tuning: the teacher of runs/transfer.sh, the same network with random weights, and logistic
# regression on log-mel statistics, which a network should beat. Tables: docs/results.md.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
for task in esc10 us8k; do
    probe "$task" --checkpoint runs/exp/pretrained --data "shards/$task" --hold-out $ESC10_FOLDS --random
    python runs/logmel_baseline.py "$AUDIO/env" --task "$task" --out "runs/exp/logmel-$task.json"
done
for task in speech_commands arabic_sc; do
    probe "$task" --checkpoint runs/exp/pretrained_words --train "shards/$task:train" --test "shards/$task:valid" --random
done
