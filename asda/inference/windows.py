"""Cut waves of any length into the windows that a network sees."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from asda.data.audio.waves import MIN_SAMPLES
from asda.data.features.fbank import FRAME_SHIFT, num_samples
from asda.errors import UserError


class Cutter:
    """Cuts a wave at 16 kHz that arrives in blocks into stretches of `window` log-mel frames, every `hop` frames.

    The last one is the first that reaches the last frame; it may be shorter, but has at least one frame. So a stretch
    is handed out when a frame behind it has arrived.
    """

    def __init__(self, window: int, hop: int):
        self._window, self._hop = window, hop
        self._held_S = torch.empty(0)

    def push(self, wave_S: Tensor) -> Iterator[Tensor]:
        """Take the next samples; yield the stretches that are complete."""
        self._held_S = torch.cat([self._held_S, wave_S]) if len(self._held_S) else wave_S
        while len(self._held_S) >= num_samples(self._window + 1):
            yield self._held_S[: num_samples(self._window)]
            self._held_S = self._held_S[self._hop * FRAME_SHIFT :]

    def flush(self) -> Tensor:
        """Return the last stretch. Raises UserError if there is not a single frame."""
        if len(self._held_S) < MIN_SAMPLES:
            raise UserError(
                f"the audio has {len(self._held_S)} samples at 16 kHz; the shortest clip has {MIN_SAMPLES} (0.025 s)"
            )
        return self._held_S


def cut(blocks: Iterable[Tensor], window: int, hop: int) -> Iterator[Tensor]:
    """Yield the stretches of a wave that comes as blocks, float32 [S] at 16 kHz; see Cutter."""
    cutter = Cutter(window, hop)
    for block_S in blocks:
        yield from cutter.push(block_S)
    yield cutter.flush()
