"""Use a trained network on audio: features, tags, and tags over time.

    model = asda.load("runs/x")
    features = model.features(audio, 48_000)  # embeddings of patches, of frames, of the clip
    tags = model.tags(audio, 48_000, top=5)
    timeline = model.timeline(audio, 48_000, window_s=2.0, hop_s=1.0)

1. wave       mean over channels, 16 kHz                asda.data.audio.arrays
2. chunks     as long as the clips in training          `cut`
3. log-mel    Kaldi's, minus its mean, over 2 std       `Model.log_mel`, asda.data.features.fbank
4. network    chunks in batches of bounded size         `Model.encode_log_mel`, `Model.logits_of_log_mel`
5. clip       chunks joined, or averaged                `Model.features`, `Model.logits`

Steps 1 and 3 are those of the official feature extraction (EAT, ASDA). The results of a clip do not depend on the other
clips in a list, except for the rounding of fp32. Memory does not grow with a clip's length, except for the clip itself
and its features.

Shapes: B chunks, S samples, T frames of a log-mel (or time patches of a clip), M mel bins, F mel patches, N patches, P
pixels of a patch, D width, C classes, W windows.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, logsigmoid

from asda.checkpoint.read import read_description, resolve_checkpoint
from asda.checkpoint.weights import Which, load_encoder, load_into, read_weights
from asda.config.model import AstConfig, ClassifyConfig
from asda.config.run import Description
from asda.data.audio.arrays import Audio, is_list, to_wave, to_waves
from asda.data.audio.waves import SAMPLE_RATE_HZ
from asda.data.features.fbank import FRAME_SHIFT, FRAME_WINDOW, log_mel_of_wave, num_frames, num_samples
from asda.errors import UserError
from asda.models.ast import AstEncoder
from asda.models.classifier import Classifier, make_encoder
from asda.models.encoder import Encoder
from asda.models.patches import normalised, padded, to_patches

FRAMES_PER_S = SAMPLE_RATE_HZ // FRAME_SHIFT  # 100
PATCHES_AT_ONCE = 2048  # in a batch: 4 chunks of 10.24 s

Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class Features:
    """Embeddings of one clip; fp32, on the CPU."""

    patches: Tensor  # [T, F, D], one per patch of 16 frames x 16 mel bins (AST's overlap); low frequencies first
    frames: Tensor  # [T, D], means over the mel patches
    utterance: Tensor  # [D], the CLS token; for AST the mean of CLS and DIST
    times_s: Tensor  # [T], the centre of each time patch


@dataclass(frozen=True)
class Tag:
    """A class and its probability."""

    label: str
    probability: float


@dataclass(frozen=True)
class Timeline:
    """Probabilities in the windows of one clip; fp32, on the CPU."""

    starts_s: Tensor  # [W]
    ends_s: Tensor  # [W]; the last window ends with the clip's last frame
    probabilities: Tensor  # [W, C], classes in the order of Model.labels


def load(path: str | Path, weights: Which = "student", device: Device = "auto") -> "Model":
    """Load a model; asda.load describes the arguments."""
    if weights not in ("student", "teacher"):
        raise UserError(f"weights {weights!r} must be 'student' or 'teacher'")
    place = _checked_device(device)
    folder = resolve_checkpoint(Path(path))
    description = read_description(folder)
    if weights == "student" and isinstance(description.objective, ClassifyConfig):
        tensors, labels = read_weights(folder, "model"), description.labels
        if "head.weight" in tensors and not labels:
            raise UserError(f"{folder}/config.json names no labels; name the classes there in the order of the logits")
        if labels:
            classifier = Classifier(description.model, description.objective, len(labels))
            load_into(classifier, tensors, folder)
            return Model(folder, description, classifier, place)
    encoder = make_encoder(description.model)
    load_encoder(encoder, description.model, folder, weights)
    return Model(folder, description, encoder, place)


class Model:
    """A network, and all that turns audio into its input. asda.load makes it; it keeps no state between calls.

    In all methods `audio` is a numpy array or a tensor, [S] or [channels, S] (averaged), of floats with full scale 1 or
    of int16, and at least 0.025 s long. `features`, `logits` and `tags` also take a list of clips of any lengths, and
    then return a list of results. `sample_rate_hz`, of all clips, is a whole number from 1000 to 768000. Results are
    fp32, on the CPU, and other networks may be trained on them. UserError says what is wrong with an argument: a shape,
    a sample that is not finite, a short clip.

    Attributes:
        folder: the checkpoint or the folder of weights.
        description: the network's sizes, its input and its objective.
        encoder: the network without its classifier, on its device, in eval mode; read it, but do not train it.
        labels: class names in the order of the logits; empty without a classifier.
        width: features of an embedding, D.
        depth: blocks of the encoder.
        hop_s: seconds from a time patch to the next: 0.16; AST 0.1.
        chunk_s: seconds that the network sees at once, the length of its training clips; 10.24 by default.
    """

    sample_rate_hz = SAMPLE_RATE_HZ  # all audio is resampled to it

    def __init__(
        self, folder: Path, description: Description, network: Encoder | AstEncoder | Classifier, device: torch.device
    ):
        network = network.to(device).eval().requires_grad_(False)
        self._classifier = network if isinstance(network, Classifier) else None
        self.encoder = network.encoder if isinstance(network, Classifier) else network
        self.folder, self.description, self._device = folder, description, device
        self.labels: tuple[str, ...] = description.labels if self._classifier else ()
        model, objective = description.model, description.objective
        self._loss = objective.loss if isinstance(objective, ClassifyConfig) else ""
        self.width, self.depth = model.width, model.depth
        self._is_ast = isinstance(model, AstConfig)
        self._stride = model.time_stride if isinstance(model, AstConfig) else model.patch  # frames
        self._patch, self._chunk = model.patch, description.data.frames  # frames
        self.hop_s, self.chunk_s = self._stride / FRAMES_PER_S, self._chunk / FRAMES_PER_S

    @overload
    def features(self, audio: Audio, sample_rate_hz: float, layer: int | None = None) -> Features: ...
    @overload
    def features(self, audio: Sequence[Audio], sample_rate_hz: float, layer: int | None = None) -> list[Features]: ...
    def features(
        self, audio: Audio | Sequence[Audio], sample_rate_hz: float, layer: int | None = None
    ) -> Features | list[Features]:
        """Compute embeddings of clips of any length.

        A clip of T frames (25 ms long, every 10 ms) is cut every `chunk_s`. A chunk has the samples that its frames
        need: neighbours share 15 ms, and no frame is lost, only samples after the last whole one. Each chunk is encoded
        by itself: its own mean is removed, its positions begin at 0, and its end is padded to a whole patch with
        data.pad_log_mel (for AST to a whole chunk, without the patches that begin after the clip). The features of a
        clip are those of its chunks in sequence. The utterance embedding is their mean, weighted by their patches.

        Layer 0 is the input of the first block, layer `depth` (the default) the output of the last.
        """
        depth = self._checked_layer(layer)
        clips = [cut(wave_S, self._chunk, self._chunk) for wave_S in to_waves(audio, sample_rate_hz)]
        encoded = self._encode_chunks(clips, depth)
        results = [self._join(list(islice(encoded, len(chunks)))) for chunks in clips]
        return results if is_list(audio) else results[0]

    @overload
    def logits(self, audio: Audio, sample_rate_hz: float) -> Tensor: ...
    @overload
    def logits(self, audio: Sequence[Audio], sample_rate_hz: float) -> list[Tensor]: ...
    def logits(self, audio: Audio | Sequence[Audio], sample_rate_hz: float) -> Tensor | list[Tensor]:
        """Compute logits [C] of clips of any length; their sigmoid (bce) or softmax (ce) gives probabilities.

        A clip is cut as for `features`. A single chunk is padded with data.pad_log_mel to the length of the training
        clips: its logits are those of asda/evaluate.py. A longer clip gets the mean of its chunks' probabilities,
        weighted by their frames; its logits are the log-odds (bce) or the logarithms (ce) of that mean. Its last chunk
        is padded to a whole patch only (for AST, which has one length, like a short clip).
        """
        self._checked_classifier()
        clips = [cut(wave_S, self._chunk, self._chunk) for wave_S in to_waves(audio, sample_rate_hz)]
        logits = self._stretch_logits(clips)
        results = [self._merge(list(islice(logits, len(chunks))), chunks) for chunks in clips]
        return results if is_list(audio) else results[0]

    @overload
    def tags(self, audio: Audio, sample_rate_hz: float, top: int = 10) -> list[Tag]: ...
    @overload
    def tags(self, audio: Sequence[Audio], sample_rate_hz: float, top: int = 10) -> list[list[Tag]]: ...
    def tags(self, audio: Audio | Sequence[Audio], sample_rate_hz: float, top: int = 10) -> list[Tag] | list[list[Tag]]:
        """Return at most `top` classes of each clip, the most probable first; `logits` says how clips are scored."""
        if isinstance(top, bool) or not isinstance(top, Integral) or top < 1:
            raise UserError(f"top {top!r} must be a whole number, 1 or more")
        logits = self.logits(audio, sample_rate_hz)
        return [self._top(logits_C, top) for logits_C in logits] if isinstance(logits, list) else self._top(logits, top)

    def timeline(
        self, audio: Audio, sample_rate_hz: float, window_s: float | None = None, hop_s: float | None = None
    ) -> Timeline:
        """Compute probabilities of the classes in consecutive windows of a clip.

        Windows have `window_s` seconds (at most chunk_s, the default) and begin every `hop_s` (at most window_s, the
        default), rounded to frames of 0.01 s. They are scored like the chunks of a long clip, see `logits`. The first
        begins with the clip; the last is the first that reaches its end, and is cut there. Short windows separate times
        better and classes worse.
        """
        self._checked_classifier()
        window = self._in_frames("window_s", window_s, self._chunk)
        hop = self._in_frames("hop_s", hop_s, window)
        wave_S = to_wave(audio, sample_rate_hz)
        windows = cut(wave_S, window, hop)
        starts_W = torch.arange(len(windows), dtype=torch.float64) * hop
        ends_W = (starts_W + window).clamp(max=num_frames(len(wave_S)))
        probabilities_WC = torch.stack([self._probabilities(logits_C) for logits_C in self._stretch_logits([windows])])
        return Timeline((starts_W / FRAMES_PER_S).float(), (ends_W / FRAMES_PER_S).float(), probabilities_WC)

    def log_mel(self, audio: Audio, sample_rate_hz: float) -> Tensor:
        """Compute the log-mel of one clip as the network needs it, (log-mel - mean) / (2 std): [T, 128], not padded.

        T counts the frames of 25 ms, every 10 ms, that lie within the clip.
        """
        return self._normalised(log_mel_of_wave(to_wave(audio, sample_rate_hz)))

    def encode_log_mel(self, mel_BTM: Tensor, layer: int | None = None) -> Tensor:
        """Compute the encoder's tokens [B, 1 + N, D]: CLS, then patches frame by frame (number = time * F + mel).

        AST has [B, 2 + N, D]: CLS, DIST, then patches band by band (number = mel * T + time). The normalised log-mels
        are as from `log_mel`, and T is a multiple of the patch's 16 frames; for AST it is the length of the training
        clips. Nothing is padded. Layers count as for `features`.
        """
        self._check_log_mel(mel_BTM)
        return self._run(self.encoder, mel_BTM, depth=self._checked_layer(layer))

    def logits_of_log_mel(self, mel_BTM: Tensor) -> Tensor:
        """Compute logits [B, C] of log-mels as for `encode_log_mel`."""
        classifier = self._checked_classifier()
        self._check_log_mel(mel_BTM)
        return self._run(classifier, mel_BTM)

    def __repr__(self) -> str:
        sizes = f"{self.depth} blocks of width {self.width}, {len(self.labels)} classes"
        return f"asda Model ({self.description.preset}, {sizes}, on {self._device})"

    def _run(self, network: nn.Module, mel_BTM: Tensor, **settings: Any) -> Tensor:
        """Return the network's output in fp32, on the CPU."""
        with torch.inference_mode():
            patches_BNP = to_patches(mel_BTM.to(self._device, torch.float32), self._patch)
            output = network(patches_BNP, **settings).float().cpu()
        return output.clone()  # because no other network can be trained on tensors of inference_mode

    def _encode_chunks(self, clips: list[list[Tensor]], depth: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Compute the embedding [D] of each chunk of each clip, and those of its patches, [T, F, D]."""
        num_mel = self.encoder.num_mel_patches
        sized = ((self._padded_frames(chunk_S), chunk_S) for chunks in clips for chunk_S in chunks)
        for frames, chunks in self._in_batches(sized, mixed=True):
            steps = [math.ceil(num_frames(len(chunk_S)) / self._stride) for chunk_S in chunks]
            present_BN = None
            if not self._is_ast and min(steps) < max(steps):
                present_BN = torch.arange(max(steps) * num_mel) < torch.tensor(steps)[:, None] * num_mel
                present_BN = present_BN.to(self._device)
            tokens_BSD = self._run(self.encoder, self._stack(chunks, frames), present_BN=present_BN, depth=depth)
            special_BKD, patches_BND = tokens_BSD.tensor_split([self.encoder.num_special], dim=1)
            if self._is_ast:  # mel band by mel band
                patches_BTFD = patches_BND.unflatten(1, (num_mel, -1)).transpose(1, 2)
            else:
                patches_BTFD = patches_BND.unflatten(1, (-1, num_mel))
            for clip_D, patches_TFD, count in zip(special_BKD.mean(1), patches_BTFD, steps, strict=True):
                yield clip_D, patches_TFD[:count]

    def _stretch_logits(self, clips: list[list[Tensor]]) -> Iterator[Tensor]:
        """Compute logits [C] of each stretch of each clip.

        A whole clip is padded to the length of the training clips, a part of one only to a whole patch: a network that
        has seen little padding takes it for a sound. For masked padding every clip is padded to a whole patch.
        """
        fills = self.description.data.padding == "constant"
        sized = ((self._padded_frames(one, fills and len(clip) == 1), one) for clip in clips for one in clip)
        for frames, stretches in self._in_batches(sized, mixed=False):
            yield from self._run(self._checked_classifier(), self._stack(stretches, frames))

    def _padded_frames(self, chunk_S: Tensor, fill: bool = False) -> int:
        """Return the frames of whole patches; if `fill`, those of a training clip, which AST always needs."""
        return self._chunk if fill or self._is_ast else math.ceil(num_frames(len(chunk_S)) / self._patch) * self._patch

    def _in_batches(self, sized: Iterable[tuple[int, Tensor]], *, mixed: bool) -> Iterator[tuple[int, list[Tensor]]]:
        """Group chunks, given with their frames, in order; yield each group with the frames of its longest.

        A group padded to its longest chunk has at most PATCHES_AT_ONCE patches of the data. Unless `mixed`, all chunks
        of a group are equally long.
        """
        batch, longest, patches_a_frame = [], 0, self.description.model.mel_bins / self._patch**2
        for frames, chunk_S in sized:
            num_patches = max(longest, frames) * (len(batch) + 1) * patches_a_frame
            if batch and (num_patches > PATCHES_AT_ONCE or (frames != longest and not mixed)):
                yield longest, batch
                batch, longest = [], 0
            batch.append(chunk_S)
            longest = max(longest, frames)
        if batch:
            yield longest, batch

    def _stack(self, chunks: list[Tensor], frames: int) -> Tensor:
        """Compute normalised log-mels of waves [S], filled up to `frames` frames: [B, T, M]."""
        value = self.description.data.pad_log_mel
        return self._normalised(torch.stack([padded(log_mel_of_wave(chunk_S), frames, value) for chunk_S in chunks]))

    def _normalised(self, mel_TM: Tensor) -> Tensor:
        stats = self.description.data.log_mel
        return normalised(mel_TM, stats.mean, stats.std)

    def _join(self, chunks: list[tuple[Tensor, Tensor]]) -> Features:
        """Join the embeddings of a clip's chunks."""
        patches_TFD = torch.cat([chunk_TFD for _, chunk_TFD in chunks])
        weight_K = torch.tensor([float(len(chunk_TFD)) for _, chunk_TFD in chunks])
        utterance_D = (weight_K / weight_K.sum()) @ torch.stack([clip_D for clip_D, _ in chunks])
        starts = [number * self._chunk + torch.arange(len(x)) * self._stride for number, (_, x) in enumerate(chunks)]
        first_centre = ((self._patch - 1) * FRAME_SHIFT + FRAME_WINDOW) / 2  # samples
        centre_T = first_centre + torch.cat(starts).double() * FRAME_SHIFT
        return Features(patches_TFD, patches_TFD.mean(1), utterance_D, (centre_T / SAMPLE_RATE_HZ).float())

    def _merge(self, logits: list[Tensor], chunks: list[Tensor]) -> Tensor:
        if len(logits) == 1:
            return logits[0]
        frames_K = torch.tensor([num_frames(len(chunk_S)) for chunk_S in chunks])
        return mean_logits(torch.stack(logits), frames_K, self._loss)

    def _probabilities(self, logits_C: Tensor) -> Tensor:
        return logits_C.softmax(0) if self._loss == "ce" else logits_C.sigmoid()

    def _top(self, logits_C: Tensor, number: int) -> list[Tag]:
        found = self._probabilities(logits_C).topk(min(number, len(self.labels)))
        return [Tag(self.labels[c], p) for p, c in zip(found.values.tolist(), found.indices.tolist(), strict=True)]

    def _checked_classifier(self) -> Classifier:
        if self._classifier is None:
            raise UserError("this model has no classifier, only features; fine-tune it, and load the fine-tuned run")
        return self._classifier

    def _checked_layer(self, layer: int | None) -> int:
        layer = self.depth if layer is None else layer
        if isinstance(layer, bool) or not isinstance(layer, Integral) or not 0 <= layer <= self.depth:
            raise UserError(
                f"layer {layer!r} must be a whole number from 0, the input of the first block, to {self.depth}, the "
                "output of the last"
            )
        return int(layer)

    def _in_frames(self, name: str, seconds: float | None, most: int) -> int:
        """Convert a length in seconds to frames; `most` by default."""
        if seconds is None:
            return most
        frames = round(seconds * FRAMES_PER_S) if math.isfinite(seconds) else 0
        if not 1 <= frames <= most:
            raise UserError(f"{name} {seconds!r} must be from 0.01 to {most / FRAMES_PER_S:g}")
        return frames

    def _check_log_mel(self, mel_BTM: Tensor) -> None:
        model, patch = self.description.model, self._patch
        if mel_BTM.ndim != 3 or not len(mel_BTM) or mel_BTM.shape[2] != model.mel_bins:
            raise UserError(f"the log-mel has shape {tuple(mel_BTM.shape)}; give [clips, frames, {model.mel_bins}]")
        frames = mel_BTM.shape[1]
        if isinstance(model, AstConfig):
            if frames != model.frames:
                raise UserError(f"the log-mel has {frames} frames; this AST takes exactly {model.frames}")
            return
        most = model.max_time_patches * patch
        if frames % patch or not 0 < frames <= most:
            words = f"give a multiple of a patch's {patch}, and at most {most}"
            raise UserError(f"the log-mel has {frames} frames; {words}")


def mean_logits(logits: Tensor, weight_K: Tensor, loss: str) -> Tensor:
    """Compute logits of weighted mean probabilities, [K, ..., C] -> [..., C]: log-odds (bce) or logarithms (ce).

    All is in logarithms, because fp32 rounds probabilities near 1 to 1.
    """
    log_weight = (weight_K / weight_K.sum()).log().reshape(-1, *[1] * (logits.ndim - 1))
    if loss == "ce":
        return (log_weight + log_softmax(logits, dim=-1)).logsumexp(0)
    log_yes, log_no = ((log_weight + logsigmoid(sign * logits)).logsumexp(0) for sign in (1, -1))
    return log_yes - log_no


def cut(wave_S: Tensor, window: int, hop: int) -> list[Tensor]:
    """Cut a wave at 16 kHz, S >= 400, into stretches of `window` log-mel frames, every `hop` frames.

    The last one is the first that reaches the last frame; it may be shorter, but has at least one frame.
    """
    num_windows = 1 + max(0, math.ceil((num_frames(len(wave_S)) - window) / hop))
    starts = range(0, num_windows * hop * FRAME_SHIFT, hop * FRAME_SHIFT)
    return [wave_S[start : start + num_samples(window)] for start in starts]


def _checked_device(device: Device) -> torch.device:
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device {device!r} must be 'auto', 'cpu' or 'cuda'")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device 'cuda': this machine has no CUDA device that torch can use; take 'auto' or 'cpu'")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
