#!/usr/bin/env bash
# Does pre-training help? One pre-training on environmental recordings, and one on recordings of one second, some of them
# spoken words. Then fine-tuning on both kinds: pre-trained against from scratch, with equal budgets. Tables: docs/results.md.
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

# Is 5e-4 a bad learning rate from scratch? Half and twice as much
for rate in 0.00025 0.001; do
    crossval "exp/esc10-scratch-$rate" real_finetune esc10 $ESC10_FOLDS 1,2,3 "${FINE[@]}" "${SCRATCH[@]}" \
        "optimizer.lr=$rate" --against runs/exp/esc10-scratch
done
