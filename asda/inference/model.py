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

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from numbers import Integral
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, logsigmoid

from asda.checkpoint.read import from_checkpoint, read_description
from asda.checkpoint.weights import Which, load_encoder, load_into, read_weights
from asda.config.model import AstConfig, ClassifyConfig
from asda.config.run import Description
from asda.data.audio.arrays import Clip, File, blocks_of, is_list, length_of, to_wave
from asda.data.audio.waves import SAMPLE_RATE_HZ, resampled_length
from asda.data.features.fbank import FRAME_SHIFT, FRAME_WINDOW, log_mel_of_wave, num_frames
from asda.errors import UserError
from asda.inference.results import Features, Tag, Timeline, mean_utterance
from asda.inference.windows import cut
from asda.models.ast import AstEncoder
from asda.models.classifier import Classifier, make_encoder
from asda.models.encoder import Encoder
from asda.models.patches import normalised, padded, to_patches

FRAMES_PER_S = SAMPLE_RATE_HZ // FRAME_SHIFT  # 100
PATCHES_AT_ONCE = 2048  # in a batch: 4 chunks of 10.24 s

LARGE_BYTES = 1 << 30  # features that large are announced before they are computed

Device = Literal["auto", "cpu", "cuda"]

_log = logging.getLogger(__name__)


def load(path: str | Path, weights: Which = "student", device: Device = "auto") -> "Model":
    """Load a model; asda.load describes the arguments."""
    if weights not in ("student", "teacher"):
        raise UserError(f"weights {weights!r} must be 'student' or 'teacher'")
    place = _checked_device(device)
    return from_checkpoint(Path(path), lambda folder: _loaded(folder, weights, place))


def _loaded(folder: Path, weights: Which, place: torch.device) -> "Model":
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

    In all methods `audio` is the path of a file, or an asda.File, which chooses a channel; or a numpy array or a
    tensor, [S] or [channels, S] (averaged), of floats with full scale 1 or of int16, with its `sample_rate_hz`, a whole
    number from 1000 to 768000. It lasts at least 0.025 s. `features`, `logits` and `tags` also take a list of clips of
    any lengths, and then return a list of results. Results are fp32, on the CPU, and other networks may be trained on
    them. A file is read block by block: a day of sound takes no more memory than a minute, except for what is returned.
    UserError says what is wrong with an argument: a file, a shape, a sample that is not finite, a short clip.

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
    def features(
        self, audio: Clip, sample_rate_hz: float | None = None, layer: int | None = None, out: Tensor | None = None
    ) -> Features: ...
    @overload
    def features(
        self, audio: Sequence[Clip], sample_rate_hz: float | None = None, layer: int | None = None
    ) -> list[Features]: ...
    def features(
        self,
        audio: Clip | Sequence[Clip],
        sample_rate_hz: float | None = None,
        layer: int | None = None,
        out: Tensor | None = None,
    ) -> Features | list[Features]:
        """Compute embeddings of clips of any length.

        A clip of T frames (25 ms long, every 10 ms) is cut every `chunk_s`. A chunk has the samples that its frames
        need: neighbours share 15 ms, and no frame is lost, only samples after the last whole one. Each chunk is encoded
        by itself: its own mean is removed, its positions begin at 0, and its end is padded to a whole patch with
        data.pad_log_mel (for AST to a whole chunk, without the patches that begin after the clip). The features of a
        clip are those of its chunks in sequence. The utterance embedding is their mean, weighted by their patches.

        Layer 0 is the input of the first block, layer `depth` (the default) the output of the last. `out` is a
        tensor of `features_shape`, for example torch.from_numpy of a numpy memory map; the patches are written into it.
        """
        clips = _clips(audio)
        if out is None:
            self._announce(clips, sample_rate_hz)
        parts = self._feature_parts(clips, sample_rate_hz, self._checked_layer(layer))
        results = [_joined((part for _, part in group), out) for _, group in groupby(parts, itemgetter(0))]
        return results if is_list(audio) else results[0]

    def feature_blocks(
        self, audio: Clip, sample_rate_hz: float | None = None, layer: int | None = None
    ) -> Iterator[Features]:
        """Yield the embeddings of one clip, a chunk at a time; joined, they are those of `features`."""
        return (part for _, part in self._feature_parts([audio], sample_rate_hz, self._checked_layer(layer)))

    def features_shape(self, audio: Clip, sample_rate_hz: float | None = None) -> tuple[int, int, int]:
        """Return the shape of a clip's patches, [T, F, D], without computing them."""
        whole, rest = divmod(num_frames(resampled_length(*length_of(audio, sample_rate_hz))), self._chunk)
        return whole * self._steps(self._chunk) + self._steps(rest), self.encoder.num_mel_patches, self.width

    @overload
    def logits(self, audio: Clip, sample_rate_hz: float | None = None) -> Tensor: ...
    @overload
    def logits(self, audio: Sequence[Clip], sample_rate_hz: float | None = None) -> list[Tensor]: ...
    def logits(self, audio: Clip | Sequence[Clip], sample_rate_hz: float | None = None) -> Tensor | list[Tensor]:
        """Compute logits [C] of clips of any length; their sigmoid (bce) or softmax (ce) gives probabilities.

        A clip is cut as for `features`. A single chunk is padded with data.pad_log_mel to the length of the training
        clips: its logits are those of asda/evaluate.py. A longer clip gets the mean of its chunks' probabilities,
        weighted by their frames; its logits are the log-odds (bce) or the logarithms (ce) of that mean. Its last chunk
        is padded to a whole patch only (for AST, which has one length, like a short clip).
        """
        self._checked_classifier()
        clips = _clips(audio)
        scored = self._stretch_logits(self._cut(clips, sample_rate_hz, self._chunk, self._chunk))
        results = [self._merge([row[1:] for row in group]) for _, group in groupby(scored, itemgetter(0))]
        return results if is_list(audio) else results[0]

    @overload
    def tags(self, audio: Clip, sample_rate_hz: float | None = None, top: int = 10) -> list[Tag]: ...
    @overload
    def tags(self, audio: Sequence[Clip], sample_rate_hz: float | None = None, top: int = 10) -> list[list[Tag]]: ...
    def tags(
        self, audio: Clip | Sequence[Clip], sample_rate_hz: float | None = None, top: int = 10
    ) -> list[Tag] | list[list[Tag]]:
        """Return at most `top` classes of each clip, the most probable first; `logits` says how clips are scored."""
        if isinstance(top, bool) or not isinstance(top, Integral) or top < 1:
            raise UserError(f"top {top!r} must be a whole number, 1 or more")
        logits = self.logits(audio, sample_rate_hz)
        return [self._top(logits_C, top) for logits_C in logits] if isinstance(logits, list) else self._top(logits, top)

    def timeline(
        self,
        audio: Clip,
        sample_rate_hz: float | None = None,
        window_s: float | None = None,
        hop_s: float | None = None,
    ) -> Timeline:
        """Compute probabilities of the classes in consecutive windows of a clip.

        Windows have `window_s` seconds (at most chunk_s, the default) and begin every `hop_s` (at most window_s, the
        default), rounded to frames of 0.01 s. They are scored like the chunks of a long clip, see `logits`. The first
        begins with the clip; the last is the first that reaches its end, and is cut there. Short windows separate times
        better and classes worse.
        """
        return Timeline.joined(self.timeline_blocks(audio, sample_rate_hz, window_s, hop_s))

    def timeline_blocks(
        self,
        audio: Clip,
        sample_rate_hz: float | None = None,
        window_s: float | None = None,
        hop_s: float | None = None,
    ) -> Iterator[Timeline]:
        """Yield the timeline of one clip in parts of one window, in memory that does not grow with the clip."""
        window, hop = self.window_and_hop(window_s, hop_s)
        scored = self._stretch_logits(self._cut([audio], sample_rate_hz, window, hop))
        for number, (_, logits_C, frames) in enumerate(scored):
            yield self._timeline(number, [(logits_C, frames)], hop)

    def timeline_of_windows(
        self, windows: list[Tensor], first: int, window_and_hop: tuple[int, int], alone: bool
    ) -> Timeline:
        """Score consecutive windows of a sound, waves [S] at 16 kHz, the first of which is number `first`.

        `alone` says that the sound has only this window; its end is then padded as that of a short clip.
        """
        scored = self._stretch_logits((0, window_S, alone) for window_S in windows)
        return self._timeline(first, [row[1:] for row in scored], window_and_hop[1])

    def window_and_hop(self, window_s: float | None, hop_s: float | None) -> tuple[int, int]:
        """Return the window and the hop of a timeline in frames. Raises UserError."""
        self._checked_classifier()
        window = self._in_frames("window_s", window_s, self._chunk)
        return window, self._in_frames("hop_s", hop_s, window)

    def duration_s(self, audio: Clip, sample_rate_hz: float | None = None) -> float:
        """Return how long a clip lasts; a file that does not tell is decoded for it."""
        num_samples, rate_hz = length_of(audio, sample_rate_hz)
        return num_samples / rate_hz

    def log_mel(self, audio: Clip, sample_rate_hz: float | None = None) -> Tensor:
        """Compute the log-mel of one clip as the network needs it, (log-mel - mean) / (2 std): [T, 128], not padded.

        T counts the frames of 25 ms, every 10 ms, that lie within the clip.
        """
        wave_S = torch.cat(list(blocks_of(audio, sample_rate_hz)))
        return self._normalised(log_mel_of_wave(to_wave(wave_S, SAMPLE_RATE_HZ)))

    def log_mel_blocks(self, audio: Clip, sample_rate_hz: float | None = None) -> Iterator[Tensor]:
        """Yield the log-mel of each chunk of a clip, [T, 128], as the network takes it: without its own mean."""
        for _, chunk_S, _ in self._cut([audio], sample_rate_hz, self._chunk, self._chunk):
            yield self._normalised(log_mel_of_wave(chunk_S))

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

    def _cut(
        self, clips: Sequence[Clip], sample_rate_hz: float | None, window: int, hop: int
    ) -> Iterator[tuple[int, Tensor, bool]]:
        """Yield (number of its clip, samples [S], whether the clip has no other) for every stretch of each clip."""
        for number, clip in enumerate(clips):
            name = f"audio[{number}]" if len(clips) > 1 else "audio"
            stretches = cut(blocks_of(clip, sample_rate_hz, name), window, hop)
            held, alone = next(stretches), True
            for stretch_S in stretches:
                yield number, held, False
                held, alone = stretch_S, False
            yield number, held, alone

    def _feature_parts(
        self, clips: Sequence[Clip], sample_rate_hz: float | None, depth: int
    ) -> Iterator[tuple[int, Features]]:
        """Yield (number of its clip, features) for each chunk of each clip."""
        num_mel = self.encoder.num_mel_patches
        stretches = self._cut(clips, sample_rate_hz, self._chunk, self._chunk)
        sized = ((self._padded_frames(chunk_S), number, chunk_S) for number, chunk_S, _ in stretches)
        place = -1, 0  # number of the clip, chunks of it that are done
        for frames, numbers, chunks in self._in_batches(sized, mixed=True):
            steps = [self._steps(num_frames(len(chunk_S))) for chunk_S in chunks]
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
            for number, clip_D, patches_TFD, count in zip(
                numbers, special_BKD.mean(1), patches_BTFD, steps, strict=True
            ):
                place = number, place[1] + 1 if number == place[0] else 0
                patches_TFD = patches_TFD[:count]
                yield number, Features(patches_TFD, patches_TFD.mean(1), clip_D, self._centres_s(place[1], count))

    def _steps(self, frames: int) -> int:
        """Return the time patches of a chunk: those that begin in it. AST has only patches that end in it as well."""
        steps = math.ceil(frames / self._stride)
        return min(steps, (self._chunk - self._patch) // self._stride + 1) if self._is_ast else steps

    def _centres_s(self, chunk: int, steps: int) -> Tensor:
        """Return the centres of the time patches of a chunk, [T]."""
        first_centre = ((self._patch - 1) * FRAME_SHIFT + FRAME_WINDOW) / 2  # samples
        start_T = chunk * self._chunk + torch.arange(steps) * self._stride  # frames
        return ((first_centre + start_T.double() * FRAME_SHIFT) / SAMPLE_RATE_HZ).float()

    def _stretch_logits(self, stretches: Iterable[tuple[int, Tensor, bool]]) -> Iterator[tuple[int, Tensor, int]]:
        """Yield (number of its clip, logits [C], frames) for each stretch.

        A whole clip is padded to the length of the training clips, a part of one only to a whole patch: a network that
        has seen little padding takes it for a sound. For masked padding every clip is padded to a whole patch.
        """
        fills = self.description.data.padding == "constant"
        sized = ((self._padded_frames(one_S, fills and alone), number, one_S) for number, one_S, alone in stretches)
        for frames, numbers, batch in self._in_batches(sized, mixed=False):
            logits_BC = self._run(self._checked_classifier(), self._stack(batch, frames))
            yield from zip(numbers, logits_BC, [num_frames(len(one_S)) for one_S in batch], strict=True)

    def _padded_frames(self, chunk_S: Tensor, fill: bool = False) -> int:
        """Return the frames of whole patches; if `fill`, those of a training clip, which AST always needs."""
        return self._chunk if fill or self._is_ast else math.ceil(num_frames(len(chunk_S)) / self._patch) * self._patch

    def _in_batches(
        self, sized: Iterable[tuple[int, int, Tensor]], *, mixed: bool
    ) -> Iterator[tuple[int, list[int], list[Tensor]]]:
        """Group chunks, given with their frames and a number, in order; yield groups with the frames of the longest.

        A group padded to its longest chunk has at most PATCHES_AT_ONCE patches of the data. Unless `mixed`, all chunks
        of a group are equally long.
        """
        numbers, batch, longest = [], [], 0
        patches_a_frame = self.description.model.mel_bins / self._patch**2
        for frames, number, chunk_S in sized:
            num_patches = max(longest, frames) * (len(batch) + 1) * patches_a_frame
            if batch and (num_patches > PATCHES_AT_ONCE or (frames != longest and not mixed)):
                yield longest, numbers, batch
                numbers, batch, longest = [], [], 0
            numbers.append(number)
            batch.append(chunk_S)
            longest = max(longest, frames)
        if batch:
            yield longest, numbers, batch

    def _stack(self, chunks: list[Tensor], frames: int) -> Tensor:
        """Compute normalised log-mels of waves [S], filled up to `frames` frames: [B, T, M]."""
        value = self.description.data.pad_log_mel
        return self._normalised(torch.stack([padded(log_mel_of_wave(chunk_S), frames, value) for chunk_S in chunks]))

    def _normalised(self, mel_TM: Tensor) -> Tensor:
        stats = self.description.data.log_mel
        return normalised(mel_TM, stats.mean, stats.std)

    def _timeline(self, first: int, scored: list[tuple[Tensor, int]], hop: int) -> Timeline:
        """Make a timeline of the logits [C] and the frames of consecutive windows from number `first` on."""
        starts_W = (first + torch.arange(len(scored), dtype=torch.float64)) * hop
        ends_W = starts_W + torch.tensor([frames for _, frames in scored])
        rows = [self._probabilities(logits_C) for logits_C, _ in scored]
        probabilities_WC = torch.stack(rows) if rows else torch.empty(0, len(self.labels))
        return Timeline(starts_W / FRAMES_PER_S, ends_W / FRAMES_PER_S, probabilities_WC)

    def _merge(self, scored: list[tuple[Tensor, int]]) -> Tensor:
        if len(scored) == 1:
            return scored[0][0]
        frames_K = torch.tensor([frames for _, frames in scored])
        return mean_logits(torch.stack([logits_C for logits_C, _ in scored]), frames_K, self._loss)

    def _announce(self, clips: Sequence[Clip], sample_rate_hz: float | None) -> None:
        """Say how large the features of a long file will be, before they are computed."""
        for clip in (clip for clip in clips if isinstance(clip, str | Path | File)):
            num_bytes = 4 * math.prod(self.features_shape(clip, sample_rate_hz))
            if num_bytes >= LARGE_BYTES:
                path = clip.path if isinstance(clip, File) else clip
                _log.warning("the features of %s take %.1f GB; feature_blocks yields them", path, num_bytes / 1e9)

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


def _clips(audio: Clip | Sequence[Clip]) -> list[Clip]:
    return list(cast(Sequence[Clip], audio)) if is_list(audio) else [cast(Clip, audio)]


def _joined(parts: Iterable[Features], out: Tensor | None) -> Features:
    """Join the features of a clip's chunks, the patches into `out` if that is given."""
    patches, frames, clips, times, step = [], [], [], [], 0
    for part in parts:
        if out is None:
            patches.append(part.patches)
        elif step + len(part.patches) > len(out) or out.shape[1:] != part.patches.shape[1:]:
            raise UserError(f"out has the shape {list(out.shape)}, which is not that of the clip; see features_shape")
        else:
            out[step : step + len(part.patches)] = part.patches
        step += len(part.patches)
        frames.append(part.frames)
        clips.append(part.utterance)
        times.append(part.times_s)
    utterance_D = mean_utterance(clips, [len(chunk_TD) for chunk_TD in frames])
    return Features(torch.cat(patches) if out is None else out[:step], torch.cat(frames), utterance_D, torch.cat(times))


def _checked_device(device: Device) -> torch.device:
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device {device!r} must be 'auto', 'cpu' or 'cuda'")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device 'cuda': this machine has no CUDA device that torch can use; take 'auto' or 'cpu'")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
