#!/usr/bin/env bash
# The ablation of HAM-AST's paper: train and evaluate its four variants, one after another.
#
#   bash runs/ham_grid.sh configs/esc50_ham.json
#   bash runs/ham_grid.sh configs/spc2_ham.json objective.init_from=weights/ast run.seed=2
#
# On ESC-50 this holds out the one fold of the configuration; the paper averages over five folds, for which docs/ham_ast.md
# has the commands. Overrides apply to all four variants. Runs are folders in RUNS (default: runs/<configuration>); the same
# command resumes stopped ones. LAUNCH is the launcher: deepspeed by default, or python for one rank.
set -euo pipefail

config=${1:?give a configuration: configs/esc50_ham.json or configs/spc2_ham.json}
shift
runs=${RUNS:-runs/$(basename "$config" .json)}

run() { # variant, Conformer blocks, channel attention, further overrides
    local variant=$1 blocks=$2 channels=$3 best=()
    shift 3
    ${LAUNCH:-deepspeed} asda/train.py --config "$config" "$@" run.folder="$runs/$variant" \
        model.conformer.blocks="$blocks" model.channel_attention.enabled="$channels"
    grep -qs '"keep_best": "[a-zA-Z]' "$runs/$variant/config.json" && best=(--best) # selected on valid, evaluated on test
    ${LAUNCH:-deepspeed} asda/evaluate.py --checkpoint "$runs/$variant" "${best[@]}"
}

run ast 0 false "$@"
run ast_channel_attention 0 true "$@"
run ast_3_conformer 3 false "$@"
run ast_6_conformer_channel_attention 6 true "$@"
