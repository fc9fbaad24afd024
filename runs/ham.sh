#!/usr/bin/env bash
# A small AST, with channel attention and with Conformer blocks. All start from one AST trained on other sounds (esc50x); the
# paper's start from an AST trained on AudioSet. The full recipe is ham_grid.sh. Tables: docs/results.md.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
all_shards

train exp/ast real_ham engine.micro_batch=16 optimizer.steps=1000 optimizer.warmup_steps=100 data.valid= run.save_every=1000 \
    data.train=shards/esc50x:fold1+fold2+fold3+fold4
wait

FINE=(engine.micro_batch=16 objective.init_from=runs/exp/ast run.log_every=50)
crossval exp/ham-ast real_ham esc10 $ESC10_FOLDS 1,2,3 "${FINE[@]}"
crossval exp/ham-channels real_ham esc10 $ESC10_FOLDS 1,2,3 "${FINE[@]}" model.channel_attention.enabled=true \
    --against runs/exp/ham-ast
crossval exp/ham-conformer3 real_ham esc10 $ESC10_FOLDS 1,2,3 "${FINE[@]}" model.conformer.blocks=3 \
    --against runs/exp/ham-ast
crossval exp/ham-conformer6-channels real_ham esc10 $ESC10_FOLDS 1,2,3 "${FINE[@]}" model.conformer.blocks=6 \
    model.channel_attention.enabled=true --against runs/exp/ham-ast
