"""Convert published checkpoints of EAT, ASDA, SSLAM and AST to asda's layout, and asda's to the official one."""

import argparse
from pathlib import Path

from asda.commands.parsing import check_range, make_parser

EXAMPLES = """examples
  asda convert EAT-base_epoch30_pt.pt --out weights/eat
      a pre-trained checkpoint; to fine-tune it: asda train ... objective.init_from=weights/eat preset=eat
  asda convert EAT-base_epoch30_ft.pt --out weights/eat_as2m
      a fine-tuned one; with 527 classes it gets AudioSet's labels, otherwise add --labels FILE
  asda convert EAT-base_epoch30_pretrain/ --out weights/eat
      a folder from Hugging Face (config.json, model.safetensors), or its model.safetensors alone
  asda convert ast-finetuned-audioset-10-10-0.4593/ --out weights/ast
      an AST from Hugging Face; to fine-tune it: asda train --config configs/esc50_ast.json
  asda convert runs/as2m --to official --out asda.pt
      a run, one of its checkpoints, or converted weights, as a file that fairseq with the official code loads

what is read
  EAT, SSLAM (the same network) and ASDA: .pt files of fairseq, pre-trained or fine-tuned, in fp32 or fp16; and
  model.safetensors from Hugging Face. AST: folders from Hugging Face (model.safetensors or pytorch_model.bin,
  config.json for sizes and labels, preprocessor_config.json for mean and std of the log-mel).
  No code in a file is run, and fairseq is not needed. Sizes come from the shapes. Checkpoints do not record lambda,
  the mean and std of the log-mel, or labels: what is assumed for them is printed.
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read these arguments, or the command line. Raises UserError."""
    parser = make_parser("convert", __doc__ or "", EXAMPLES)
    add = parser.add_argument
    add("input", type=Path, help="the checkpoint: a file, or a folder")
    add("--out", required=True, type=Path, help="the folder to write; with --to official the file")
    add("--to", choices=("asda", "official"), default="asda", help="the layout to write (default: %(default)s)")
    add("--heads", type=int, metavar="N", help="attention heads, if no cfg tells them (default: 64 features each)")
    add("--mean", type=float, metavar="X", help="mean of the log-mel in training (default: that of the dataset)")
    add("--std", type=float, metavar="X", help="standard deviation of the log-mel in training")
    add("--labels", type=Path, metavar="FILE", help="class names of a classifier, one per line, in their order")
    add("--preset", choices=("released", "paper"), help="for an ASDA: lambda is 0.1 as released (default), or 0.3")
    add("--force", action="store_true", help="replace --out")
    args = parser.parse_args(argv)
    if args.heads is not None:
        check_range("--heads", args.heads, 1)
    return args


def main(argv: list[str] | None = None) -> None:
    """Convert in the direction of --to, and say what was read and written."""
    args = parse_args(argv)

    from asda.commands.convert_files import to_asda, to_official_file  # brings torch

    print("\n".join(to_official_file(args) if args.to == "official" else to_asda(args)))
