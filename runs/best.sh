#!/usr/bin/env bash
# The best small model for ESC-10: pre-trained without labels (runs/transfer.sh), then trained on ESC-50's 40 other classes,
# then fine-tuned with augmentation, twice as long. Settings were chosen on us8k, never on esc10. Tables: docs/results.md.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
all_shards

FINE=(engine.micro_batch=16 run.log_every=50 objective.pooling=mean optimizer.steps=600 optimizer.warmup_steps=60
    data.augment.mixup.alpha=0.5 data.augment.roll=true
    data.augment.spec_augment.mel_ratio=0.2 data.augment.spec_augment.frame_ratio=0.2)
train exp/labelled real_finetune "${FINE[@]}" data.train=shards/esc50x:fold1+fold2+fold3+fold4 data.valid= \
    objective.init_from=runs/exp/pretrained run.save_every=600
wait
crossval exp/esc10-best real_finetune esc10 $ESC10_FOLDS 1,2,3 "${FINE[@]}" objective.init_from=runs/exp/labelled \
    --against runs/exp/esc10-scratch
for fold in 1 2 3 4; do
    networks=()
    for seed in 1 2 3; do networks+=("runs/exp/esc10-best/fold$fold-seed$seed"); done
    python asda/evaluate.py --checkpoint "${networks[@]}" --ensemble --data "shards/esc10:fold$fold" \
        --out "runs/exp/esc10-best/ensemble-fold$fold.json"
done
