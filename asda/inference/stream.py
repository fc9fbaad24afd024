"""Tag a sound over time while it arrives."""

import torch
from torch import Tensor

from asda.data.audio.arrays import Audio, to_mono
from asda.data.audio.resampling import Resampler
from asda.data.audio.waves import SAMPLE_RATE_HZ
from asda.errors import UserError
from asda.inference.model import Model
from asda.inference.results import Timeline
from asda.inference.windows import Cutter


class Stream:
    """Tags over time of a sound that still arrives.

        stream = asda.Stream(model, window_s=2.0, hop_s=0.5)
        for samples in microphone: print(stream.push(samples, 48_000))
        print(stream.flush())

    All parts joined are Model.timeline of the whole sound, within the rounding of fp32. A window is scored as soon as
    0.01 s behind it have arrived.
    """

    def __init__(self, model: Model, window_s: float | None = None, hop_s: float | None = None):
        """Take window and hop as Model.timeline does. Raises UserError."""
        self._model = model
        self._window_and_hop = model.window_and_hop(window_s, hop_s)
        self._cutter = Cutter(*self._window_and_hop)
        self._resampler: Resampler | None = None
        self._rate_hz, self._num_windows = 0.0, 0

    def push(self, samples: Audio, sample_rate_hz: float = SAMPLE_RATE_HZ) -> Timeline:
        """Take the next samples, as Model.timeline takes a clip, of any length; return the windows they complete.

        Raises:
            UserError: the samples cannot be used, or their rate differs from that of the samples before.
        """
        mono_S, rate_hz = to_mono(samples, sample_rate_hz)
        if self._resampler is None:
            self._resampler, self._rate_hz = Resampler(rate_hz), rate_hz
        if rate_hz != self._rate_hz:
            raise UserError(f"sample_rate_hz {rate_hz} differs from {self._rate_hz}, that of the samples before")
        return self._scored(list(self._cutter.push(torch.from_numpy(self._resampler.push(mono_S)))))

    def flush(self) -> Timeline:
        """End the sound; return its last windows. Raises UserError if it was shorter than 0.025 s."""
        rest = [] if self._resampler is None else list(self._cutter.push(torch.from_numpy(self._resampler.flush())))
        return self._scored([*rest, self._cutter.flush()], ended=True)

    def _scored(self, windows: list[Tensor], *, ended: bool = False) -> Timeline:
        alone = ended and self._num_windows == 0 and len(windows) == 1
        first, self._num_windows = self._num_windows, self._num_windows + len(windows)
        return self._model.timeline_of_windows(windows, first, self._window_and_hop, alone)
