"""Write one HTML page about a run, or about several side by side.

Pre-trainings and fine-tunings may be mixed: what each is, held-out figures, curves, throughput and memory, how the
configurations differ, confusions, what students see, where the teacher looks. The page holds everything it shows, so it
can be mailed; it runs no scripts.
"""

import argparse
from pathlib import Path

from asda.commands.parsing import make_parser
from asda.system import write_whole_file

EXAMPLES = """examples
  asda report runs/mine
      the page of one run, in report.html
  asda report runs/pretrain runs/finetune runs/scratch --out comparison.html
      three runs side by side

If the data or the checkpoints of a run are missing, its pictures are left out, and the page says why. Held-out figures
are those of asda evaluate, if it has been run, and of data.test at the best and the last step; otherwise the newest of
data.valid.
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read these arguments, or the command line."""
    parser = make_parser("report", (__doc__ or "").strip(), EXAMPLES)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the folder of a run")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and write the page."""
    args = parse_args(argv)

    from asda.commands.report_page import build_page  # brings torch
    from asda.commands.report_runs import read_runs

    page = build_page(read_runs(args.runs)).encode()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.out.exists() and not args.out.is_file():  # /dev/stdout
        args.out.write_bytes(page)
    else:
        write_whole_file(args.out.resolve(), page)
    print(f"written {args.out}")
