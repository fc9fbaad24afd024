"""Run the full pipeline on a small set of sounds: shards, pre-training, fine-tuning, evaluation, report.

`make demo` runs this. Without --audio it synthesises eight classes of sounds; with --audio FOLDER (one subfolder per
class) it takes yours. Every step is a command that a user could type, and is printed before it runs.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from sounds import CLASSES, write_dataset

from asda.errors import UserError, exit_with_sentence

ROOT = Path(__file__).resolve().parent.parent
CLIPS_PER_CLASS = 120
RANKS = 2
FAST_BF16 = ("amx_bf16", "avx512_bf16", "avx512bw")  # CPU features with which torch multiplies in bf16 at speed
MARKER = "made_by_demo.txt"  # in --out: everything beside it may be replaced


def demo(audio: Path | None, out: Path) -> None:
    """Run every part once, in `out`; a second run starts over. Raises UserError."""
    _claim(out)
    started = time.monotonic()
    shards, pretrained, finetuned, scratch = (out / name for name in ("shards", "pretrained", "finetuned", "scratch"))
    if audio is None:
        audio = out / "audio"
        _synthesise(audio)
        # Many unlabelled clips and few labelled ones: the case for pre-training.
        splits, unlabelled, labelled = ("unlabelled=65%", "labelled=5%", "test=30%"), "unlabelled+labelled", "labelled"
    else:
        splits, unlabelled, labelled = ("train=70%", "test=30%"), "train", "train"
    chosen = [argument for split in splits for argument in ("--split", split)]
    _asda("shards", "--source", "folder", "--input", audio, "--out", shards, "--overwrite", *chosen)

    _train("demo_pretrain.json", pretrained, f"data.train={shards}:{unlabelled}")
    data = (f"data.train={shards}:{labelled}", f"data.valid={shards}:test")
    _train("demo_finetune.json", finetuned, *data, f"objective.init_from={pretrained}")
    _train("demo_finetune.json", scratch, *data, "objective.init_from=", "optimizer.lr=0.001")  # its best one
    for run in (finetuned, scratch):
        _run(*_launcher(), "asda.evaluate", "--checkpoint", run)

    report = out / "report.html"
    _asda("report", pretrained, finetuned, scratch, "--out", report)
    _print_table(finetuned, scratch)
    print(f"\n{report}  (curves, masks and attention; open it in a browser)\n{time.monotonic() - started:.0f} s in all")


def _claim(out: Path) -> None:
    """Mark the folder as the demo's, which deletes parts of it. Raises UserError if it holds other files."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is not a folder; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    if (out / MARKER).exists():
        return
    if any(out.iterdir()):
        raise UserError(
            f"--out {out} holds files that this demo has not written; remove the folder if it is an older demo's, or "
            "choose another --out"
        )
    (out / MARKER).write_text(
        "tools/demo.py made this folder, and replaces what is in it when it runs again.\n", encoding="utf-8"
    )


def _synthesise(audio: Path) -> None:
    print(f"synthesising {CLIPS_PER_CLASS} clips of each of {', '.join(CLASSES)} into {audio}", flush=True)
    shutil.rmtree(audio, ignore_errors=True)
    write_dataset(audio, CLIPS_PER_CLASS, seed=1)


def _asda(command: str, *arguments: object) -> None:
    _run(sys.executable, "-m", "asda", command, *arguments)


def _train(config: str, run: Path, *overrides: str) -> None:
    shutil.rmtree(run, ignore_errors=True)  # or an older demo would be resumed
    own = [f"run.folder={run}", *precision_for(Path("/proc/cpuinfo").read_text(encoding="utf-8"))]
    _run(*_launcher(), "asda.train", "--config", ROOT / "configs" / config, *own, *overrides)


def precision_for(cpuinfo: str) -> list[str]:
    """Return the override to fp32 for a CPU whose bf16 products would take an hour; nothing for a GPU or other CPUs."""
    if Path("/dev/nvidia0").exists() or any(feature in cpuinfo for feature in FAST_BF16):
        return []
    return ["engine.precision=fp32"]


def _launcher() -> tuple[str, ...]:
    """Return the start of a DeepSpeed launch; the launcher lies beside the interpreter that runs this."""
    launcher = Path(sys.executable).with_name("deepspeed")
    return (str(launcher), "--num_accelerators", str(RANKS), "--module")


def _run(*arguments: object) -> None:
    command = [*map(str, arguments)]
    print(f"\n$ {shlex.join(command)}", flush=True)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, check=False, env=environment)
    if done.returncode:
        raise UserError(f"this step of the demo ended with exit code {done.returncode}; see its message above")


def _print_table(finetuned: Path, scratch: Path) -> None:
    print(f"\n{'held-out clips':34} accuracy    mAP")
    for name, run in (("pre-trained, then fine-tuned", finetuned), ("the same network from scratch", scratch)):
        figures = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
        print(f"{name:34} {100 * figures['accuracy']:6.1f} %  {figures['mAP']:.3f}")
    print(
        f"{'chance':34} {100 / figures['classes']:6.1f} %     ({figures['clips']} clips, {figures['classes']} classes)"
    )


def main() -> None:
    """Parse the command line and run the demo."""
    parser = argparse.ArgumentParser(prog="tools/demo.py", description="The full pipeline on a small set of sounds.")
    parser.add_argument("--audio", type=Path, help="your own audio, one subfolder per class (default: synthesised)")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="where everything goes (default: demo)")
    args = parser.parse_args()
    demo(args.audio, args.out)


if __name__ == "__main__":
    exit_with_sentence(main)
