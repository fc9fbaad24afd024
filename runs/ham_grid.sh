#!/usr/bin/env bash
# The ablation of HAM-AST's paper: its four variants, one after the other, each trained and evaluated.
#
#   bash runs/ham_grid.sh configs/esc50_ham.json
#   bash runs/ham_grid.sh configs/spc2_ham.json objective.init_from=weights/ast run.seed=2
#
# Of ESC-50 that is the one fold which the configuration holds out; the paper's figures are means over five, for which
# docs/ham_ast.md has the commands. What follows the configuration goes to all four. Runs are folders of RUNS (by default
# runs/<configuration>); stopped ones go on with the same command. LAUNCH is the launcher: deepspeed by default, or python
# for one rank.
set -euo pipefail

config=${1:?give a configuration: configs/esc50_ham.json or configs/spc2_ham.json}
shift
runs=${RUNS:-runs/$(basename "$config" .json)}

run() { # variant, Conformer blocks, channel attention, further overrides
    local variant=$1 blocks=$2 channels=$3 best=()
    shift 3
    ${LAUNCH:-deepspeed} asda/train.py --config "$config" "$@" run.folder="$runs/$variant" \
        model.conformer.blocks="$blocks" model.channel_attention.enabled="$channels"
    grep -qs '"keep_best": "[a-zA-Z]' "$runs/$variant/config.json" && best=(--best) # chosen on valid, judged on test
    ${LAUNCH:-deepspeed} asda/evaluate.py --checkpoint "$runs/$variant" "${best[@]}"
}

run ast 0 false "$@"
run ast_channel_attention 0 true "$@"
run ast_3_conformer 3 false "$@"
run ast_6_conformer_channel_attention 6 true "$@"
