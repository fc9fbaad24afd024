"""One HTML page about a pre-training run, what it was fine-tuned to, and the same network from scratch.

    python tools/report.py --pretrained runs/a --finetuned runs/b --scratch runs/c --out report.html

Curves, a spectrogram as a student sees it, attention with both of its maps, and the table of held-out figures; the
pictures are inside the page, so it can be mailed.
"""

import argparse
import base64
import html
import io
import json
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure

from asda import checkpoint
from asda.config import Config, PretrainConfig, of_asda
from asda.data.clips import Clip, ClipDataset, read_clips
from asda.data.fbank import log_mel
from asda.data.order import Draw, clip_rng
from asda.errors import UserError, exit_with_sentence
from asda.models.attention import Attention
from asda.models.encoder import Block, Encoder
from asda.models.masks import inverse_block_masks
from asda.runlog import read_metrics

FRAME_SHIFT_S = 0.01
BLUE, ORANGE, GREY = "#2a6f97", "#e07a1f", "#8d99ae"
HEAD = """<!doctype html>
<html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width"><title>asda</title><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; } figure { margin: 1rem 0; }
img { max-width: 100%; } figcaption { color: #555; font-size: .9rem; } table { border-collapse: collapse; }
td, th { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right; } td:first-child { text-align: left; }
</style>
"""


def write_report(pretrained: Path, finetuned: Path, scratch: Path, out: Path) -> None:
    """Write the page. Raises UserError when a run has no intact checkpoint or no evaluation.json."""
    folder = checkpoint.resolve(pretrained)
    config, state = checkpoint.read_state(folder)
    objective = config.objective
    if not isinstance(objective, PretrainConfig):
        raise UserError(f"{pretrained} is not a pre-training run; give one whose objective.kind is pretrain")
    dataset = ClipDataset(*(part.data for part in config.data.datasets), labelled=False)
    clip = _liveliest(read_clips(dataset, [Draw(0, number) for number in range(min(24, len(dataset)))]), config)
    teacher = Encoder(of_asda(config.model))
    teacher.load_state_dict(checkpoint.read_weights(folder, "teacher"))

    page = [
        f"<h1>{html.escape(pretrained.name)}: {state.step:,} steps of pre-training, then fine-tuning</h1>",
        "<h2>Held-out clips</h2>",
        _table({"pre-trained, then fine-tuned": finetuned, "the same network from scratch": scratch}),
        "<h2>Curves</h2>",
        _figure(
            _curves(pretrained, finetuned, scratch),
            "Left: what the students fail to predict of the teacher (frame loss, logarithmic). Middle: the spread of "
            "the teacher's targets and of the predictions over patches; a spread of 0 would be collapse. Right: the "
            "classifier's loss on its training clips, with and without pre-training.",
        ),
        "<h2>What a student sees</h2>",
        _figure(
            _masked_spectrogram(clip, config, objective),
            f"Log-mel of the clip {html.escape(clip.key)}, and the same clip through one student's mask: "
            f"{100 * objective.mask.ratio:.0f} % of the {config.model.patch} x {config.model.patch} patches are hidden "
            "(grey). The student predicts the teacher's features there.",
        ),
        "<h2>Where the teacher looks</h2>",
        _figure(
            _attention(clip, config, teacher),
            "Attention of the CLS token in the last block, mean over heads, laid over the patches of the same clip: "
            "the first map, the second map, and the first minus lambda times the second, which mixes the values "
            "(one map where there is no lambda). Red adds and blue subtracts. The numbers are multiples of what a "
            "patch would get if attention were spread evenly.",
        ),
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(HEAD + "\n".join(page) + "</html>\n", encoding="utf-8")


def _liveliest(clips: list[Clip], config: Config) -> Clip:
    """The clip whose patches change most over time: a picture of it shows more than one of steady noise."""

    def liveliness(clip: Clip) -> float:
        patch = config.model.patch
        means_tf = _image(clip, config).reshape(-1, patch, config.model.mel_bins // patch, patch).mean((1, 3))
        return float(means_tf.std(0).mean())

    return max(clips, key=liveliness)


def _table(runs: dict[str, Path]) -> str:
    rows = ["<table><tr><th></th><th>accuracy</th><th>mAP</th><th>clips</th><th>classes</th><th>chance</th></tr>"]
    for name, run in runs.items():
        figures = _evaluation(run)
        accuracy = f"{100 * figures['accuracy']:.1f} %" if "accuracy" in figures else ""
        rows.append(
            f"<tr><td>{name}</td><td>{accuracy}</td><td>{figures['mAP']:.3f}</td><td>{figures['clips']}</td>"
            f"<td>{figures['classes']}</td><td>{100 / figures['classes']:.1f} %</td></tr>"
        )
    return "".join(rows) + "</table>"


def _evaluation(run: Path) -> dict:
    path = run / "evaluation.json"
    if not path.is_file():
        raise UserError(f"{path} is missing; write it with: python asda/evaluate.py --checkpoint {run}")
    return json.loads(path.read_text())


def _figure(figure: Figure, caption: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f"<figure><img alt='' src='data:image/png;base64,{encoded}'><figcaption>{caption}</figcaption></figure>"


def _curves(pretrained: Path, finetuned: Path, scratch: Path) -> Figure:
    figure, (loss, spread, labels) = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    entries = read_metrics(pretrained, "train")
    steps = [entry["step"] for entry in entries]
    loss.semilogy(steps, [entry["frame_loss"] for entry in entries], color=BLUE)
    loss.set(title="pre-training: frame loss", xlabel="step")
    loss.yaxis.set_major_formatter("{x:g}")
    loss.yaxis.set_minor_formatter("{x:g}")
    spread.plot(steps, [entry["target_variance"] for entry in entries], color=BLUE, label="targets")
    spread.plot(steps, [entry["prediction_variance"] for entry in entries], color=ORANGE, label="predictions")
    spread.set(title="pre-training: spread", xlabel="step", ylim=(0, None))
    spread.legend()
    for run, colour, name in ((finetuned, BLUE, "pre-trained"), (scratch, GREY, "from scratch")):
        entries = read_metrics(run, "train")
        labels.plot([e["step"] for e in entries], [e["loss"] for e in entries], color=colour, label=name)
    labels.set(title="fine-tuning: loss", xlabel="step", ylim=(0, None))
    labels.legend()
    for axes in (loss, spread, labels):
        axes.grid(alpha=0.3, which="both")
    return figure


def _masked_spectrogram(clip: Clip, config: Config, objective: PretrainConfig) -> Figure:
    image_TF = _image(clip, config)
    patch = config.model.patch
    grid = (config.data.frames // patch, config.model.mel_bins // patch)
    visible_N = inverse_block_masks(clip_rng(config.run.seed, clip.draw, "masks"), 1, grid, objective.mask)[0]
    hidden_TF = ~np.kron(visible_N.reshape(grid), np.ones((patch, patch), dtype=bool))
    figure, axes = plt.subplots(1, 2, figsize=(13, 3.2), layout="constrained", sharey=True)
    palette = plt.get_cmap("magma").copy()
    palette.set_bad("#b8bec7")
    for one, shown, title in (
        (axes[0], image_TF, "the clip"),
        (axes[1], np.ma.array(image_TF, mask=hidden_TF), "what one student sees"),
    ):
        _show(one, shown, palette, image_TF.min(), image_TF.max())
        one.set_title(title)
    axes[0].set_ylabel("mel bin")
    return figure


@torch.inference_mode()
def _attention(clip: Clip, config: Config, encoder: Encoder) -> Figure:
    image_TF = _image(clip, config)
    maps_TF = [_cls_row(one, config) for one in _last_block(encoder).maps(_last_input(image_TF, config, encoder))]
    figure, axes = plt.subplots(1, 4 if len(maps_TF) > 1 else 2, figsize=(13, 2.8), layout="constrained", sharey=True)
    _show(axes[0], image_TF, "magma", image_TF.min(), image_TF.max())
    axes[0].set(title="the clip", ylabel="mel bin")
    top = max(map_TF.max() for map_TF in maps_TF)
    for one, shown, title in zip(axes[1:], maps_TF, ("first map", "second map"), strict=False):
        _show(one, shown, "viridis", 0, top, bar=True)
        one.set_title(title)
    if len(maps_TF) > 1:
        lam = float(_last_block(encoder).current_lambda())
        difference_TF = maps_TF[0] - lam * maps_TF[1]
        limit = np.abs(difference_TF).max()
        _show(axes[3], difference_TF, "RdBu_r", -limit, limit, bar=True)
        axes[3].set_title(f"first - {lam:.3g} x second")
    return figure


def _last_block(encoder: Encoder) -> Attention:
    last = encoder.blocks[-1]
    assert isinstance(last, Block)
    return last.attn


def _last_input(image_TF: np.ndarray, config: Config, encoder: Encoder) -> torch.Tensor:
    """The tokens that enter the last block for one clip, [1, 1 + N, D]."""
    patch = config.model.patch
    patches_BNP = torch.from_numpy(image_TF).unfold(0, patch, patch).unfold(1, patch, patch).reshape(1, -1, patch**2)
    return encoder.layers(patches_BNP)[-2]


def _cls_row(map_BHNN: torch.Tensor, config: Config) -> np.ndarray:
    """What CLS takes from each patch, in the shape of the spectrogram, times the number of patches: 1 is the mean."""
    patch = config.model.patch
    row_N = map_BHNN[0, :, 0, 1:].mean(0)
    grid_TF = (row_N * row_N.numel()).reshape(-1, config.model.mel_bins // patch).numpy()
    return np.kron(grid_TF, np.ones((patch, patch)))


def _image(clip: Clip, config: Config) -> np.ndarray:
    """Normalised log-mel of one clip, padded or cut to data.frames, [frames, mel bins] float32."""
    stats = config.data.log_mel
    assert stats != "dataset", "a run's own configuration has the figures"
    image_TF = np.full((config.data.frames, config.model.mel_bins), config.data.pad_log_mel, dtype=np.float32)
    values_TF = log_mel(clip.samples)[: config.data.frames]
    image_TF[: len(values_TF)] = values_TF
    return (image_TF - np.float32(stats.mean)) / np.float32(2 * stats.std)


def _show(
    axes: Axes, image_TF: np.ndarray, palette: str | Colormap, low: float, high: float, bar: bool = False
) -> None:
    extent = (0, len(image_TF) * FRAME_SHIFT_S, 0, image_TF.shape[1])
    drawn = axes.imshow(image_TF.T, origin="lower", aspect="auto", cmap=palette, vmin=low, vmax=high, extent=extent)
    axes.set_xlabel("seconds")
    if bar:
        axes.figure.colorbar(drawn, ax=axes, shrink=0.8)


def main() -> None:
    """Parse the command line and write the page."""
    parser = argparse.ArgumentParser(
        prog="tools/report.py", description="One HTML page about a pre-training run and its use."
    )
    parser.add_argument("--pretrained", required=True, type=Path, help="the pre-training run's folder")
    parser.add_argument("--finetuned", required=True, type=Path, help="run fine-tuned from it, with evaluation.json")
    parser.add_argument("--scratch", required=True, type=Path, help="the same from scratch, with evaluation.json")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page (default: report.html)")
    args = parser.parse_args()
    write_report(args.pretrained, args.finetuned, args.scratch, args.out)
    print(f"written {args.out}")


if __name__ == "__main__":
    exit_with_sentence(main)
