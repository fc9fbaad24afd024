#!/usr/bin/env bash
# Does pre-training pay? One pre-training on recordings of environments, one on recordings of a second each with words among
# them, then environmental sounds and words: pre-trained against from scratch at equal budget. Tables: docs/results.md.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
all_shards

train exp/pretrained real_pretrain "data.train=[$UNLABELLED]" engine.micro_batch=16 optimizer.steps=4000 \
    optimizer.warmup_steps=400 objective.ema.end_decay=0.9998 objective.ema.anneal_steps=3000 \
    run.log_every=50 run.save_every=500
WORDS='{"data":["shards/speech_commands:train","shards/arabic_sc:train"],"share":0.4}'
PILE='{"data":"shards/pile:train","share":0.5},{"data":"shards/esc50x:fold1+fold2+fold3+fold4","share":0.1}'
train exp/pretrained_words real_pretrain "data.train=[$PILE,$WORDS]" data.frames=128 engine.micro_batch=32 \
    optimizer.batch=64 optimizer.steps=1500 run.log_every=50 run.save_every=500
wait

FINE=(engine.micro_batch=16 run.log_every=50 objective.pooling=mean)
SCRATCH=(objective.init_from= objective.layer_decay=1.0)
for task in esc10 us8k; do
    crossval "exp/$task-scratch" real_finetune "$task" $ESC10_FOLDS 1,2,3 "${FINE[@]}" "${SCRATCH[@]}"
    crossval "exp/$task-pretrained" real_finetune "$task" $ESC10_FOLDS 1,2,3 "${FINE[@]}" \
        objective.init_from=runs/exp/pretrained --against "runs/exp/$task-scratch"
done
for task in speech_commands arabic_sc; do
    crossval "exp/$task-scratch" real_finetune "$task" valid 1,2,3 data.frames=128 "${FINE[@]}" "${SCRATCH[@]}"
    crossval "exp/$task-pretrained" real_finetune "$task" valid 1,2,3 data.frames=128 "${FINE[@]}" \
        objective.init_from=runs/exp/pretrained_words --against "runs/exp/$task-scratch"
done

# Whether the start from scratch has the worse learning rate: half and twice as much
for rate in 0.00025 0.001; do
    crossval "exp/esc10-scratch-$rate" real_finetune esc10 $ESC10_FOLDS 1,2,3 "${FINE[@]}" "${SCRATCH[@]}" \
        "optimizer.lr=$rate" --against runs/exp/esc10-scratch
done
