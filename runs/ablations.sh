#!/usr/bin/env bash
# The paper's ablations, and questions it leaves open, with a network of 0.9 M parameters: each variant is pre-trained with
# three seeds and fine-tuned on ESC-10, with every fold held out once. Tables: docs/results.md.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
all_shards

SMALL=(model.width=128 model.depth=4 model.heads=4)
BASE=("${SMALL[@]}" "data.train=[$UNLABELLED]" objective.target_layers=4 objective.decoder.width=128 optimizer.batch=8
    optimizer.steps=600 optimizer.warmup_steps=60 optimizer.lr=0.001 engine.micro_batch=8
    run.log_every=50 run.save_every=100000 run.eval_every=100000
    'probe={"train":"shards/esc10:fold1+fold2+fold3","test":"shards/esc10:fold4"}')

# *_equal: as many steps as cost the FLOPs of 600 steps with 8 students; a student takes 379 MFLOP a clip, the teacher 658
VARIANTS=(
    "base"
    "one_map model.attention_lambda=absent"
    "lambda_0 model.attention_lambda=0.0"
    "lambda_0.3 model.attention_lambda=0.3"
    "lambda_0.5 model.attention_lambda=0.5"
    "lambda_learned model.attention_lambda=learned"
    "utterance_0 objective.utterance_weight=0.0"
    "utterance_96 objective.utterance_weight=96.0"
    "students_1 objective.students=1"
    "students_4 objective.students=4"
    "students_16 objective.students=16"
    "students_1_equal objective.students=1 optimizer.steps=2136"
    "students_4_equal objective.students=4 optimizer.steps=1018"
    "students_16_equal objective.students=16 optimizer.steps=329"
)
for seed in 1 2 3; do
    for variant in "${VARIANTS[@]}"; do
        read -r name overrides <<< "$variant"
        # shellcheck disable=SC2086  # words are overrides
        train "exp/$name-$seed" real_pretrain "${BASE[@]}" $overrides "run.seed=$seed"
    done
done
wait

# Does the best lambda depend on the task? Frozen features on two tasks other than esc10
for seed in 1 2 3; do
    for variant in "${VARIANTS[@]}"; do
        read -r name overrides <<< "$variant"
        [[ $name == base || $overrides == model.attention_lambda=* ]] || continue
        beside probe "us8k-$name-$seed" --checkpoint "runs/exp/$name-$seed" --data shards/us8k --hold-out $ESC10_FOLDS
        beside probe "speech_commands-$name-$seed" --checkpoint "runs/exp/$name-$seed" --train shards/speech_commands:train \
            --test shards/speech_commands:valid
    done
done
wait

FINE=("${SMALL[@]}" engine.micro_batch=16 optimizer.steps=200 optimizer.warmup_steps=20 optimizer.lr=0.001
    objective.pooling=mean run.log_every=50)
crossval exp/esc10-small-scratch real_finetune esc10 $ESC10_FOLDS 1,2,3 "${FINE[@]}" objective.init_from= \
    objective.layer_decay=1.0
for variant in "${VARIANTS[@]}"; do
    read -r name overrides <<< "$variant"
    lambda=$(grep -o 'model.attention_lambda=[^ ]*' <<< "$overrides" || true)
    # shellcheck disable=SC2086
    crossval "exp/esc10-$name" real_finetune esc10 $ESC10_FOLDS 1,2,3 "${FINE[@]}" $lambda \
        "objective.init_from=runs/exp/$name-{seed}" --against runs/exp/esc10-base
done
