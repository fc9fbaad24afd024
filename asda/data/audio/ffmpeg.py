"""Decode what only FFmpeg knows: AAC, ALAC or Opus in MP4, M4A, WebM, Matroska or ADTS, WMA, WavPack, AC-3, AMR,
and FLAC in Ogg.

By PyAV, the extra `m4a`. Files are opened as the one format that their first bytes name, and through a file object:
FFmpeg opens no other file and no address that a file may name. Containers only estimate lengths, so they are bounded
while decoding.
"""

import importlib.util
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from asda.data.audio.waves import AudioError, check_format

if TYPE_CHECKING:
    from av import AudioStream
    from av.container import InputContainer

EXTRA = "pip install 'asda[m4a]'"
PREROLL_S = 0.5  # decoded before a segment and dropped: codecs take up to 80 ms (Opus) to settle
TRACK_SLACK_FRAMES = 8192  # what encoders pad at both ends: up to two AAC frames of 2048 (HE-AAC) each
MICROSECONDS = 1_000_000  # a second, in the unit of a container's duration
CONTAINER_SLACK_S = 1.0  # Matroska declares the length of its longest track, which may be the video
SIGNATURES = (  # first bytes, where they stand, and FFmpeg's name of the format
    (b"ftyp", 4, "mov"),  # MP4, M4A, 3GP
    *((atom, 4, "mov") for atom in (b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")),  # QuickTime
    (b"\x1a\x45\xdf\xa3", 0, "matroska"),  # Matroska, WebM
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", 0, "asf"),  # WMA
    (b"wvpk", 0, "wv"),
    (b"TTA1", 0, "tta"),
    (b"MAC ", 0, "ape"),
    (b"MPCK", 0, "mpc8"),
    (b"MP+", 0, "mpc"),
    (b"DSD ", 0, "dsf"),
    (b"#!AMR", 0, "amr"),
    (b"\x7fFLAC", 28, "ogg"),  # FLAC in Ogg: the libsndfile of soundfile's wheels cannot read it
)
HEAD_BYTES = 64  # of a file, that hold any of these
SEEKING = {"mov", "matroska", "wv", "tta"}  # whose time stamps are right; others are decoded from their beginning
NO_LENGTH = {"aac", "ac3", "eac3", "amr", "mp3"}  # FFmpeg guesses one from the first bit rates


def has_pyav() -> bool:
    """Return whether the extra is installed."""
    return importlib.util.find_spec("av") is not None


def demuxer_of(head: bytes) -> str:
    """Return FFmpeg's name of the format of a file that only FFmpeg reads, by its first HEAD_BYTES, else ""."""
    for signature, place, demuxer in SIGNATURES:
        if head[place:].startswith(signature):
            return demuxer
    if len(head) > 5 and head[:2] == b"\x0b\x77":  # AC-3; its version stands in five bits
        return "eac3" if head[5] >> 3 > 10 else "ac3"
    if len(head) > 1 and head[0] == 0xFF and head[1] & 0xF0 == 0xF0:  # sync of ADTS and of MPEG-1 and 2 audio
        layer = head[1] >> 1 & 3  # 0 in ADTS; libsndfile reads layer 3, 1 here
        return {0: "aac", 2: "mp3", 3: "mp3"}.get(layer, "")
    return ""


class _File(io.FileIO):
    """A file that answers a wrong seek as FFmpeg expects it: PyAV would print the traceback of an exception."""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move; return the new place, or -1 if there is no such place."""
        try:
            return super().seek(offset, whence)
        except (OSError, OverflowError):
            return -1


@contextmanager
def _open_track(path: Path, demuxer: str) -> Iterator[tuple["InputContainer", "AudioStream"]]:
    """Open the first track that can be decoded. Errors of FFmpeg in the block become AudioError."""
    import av
    from av.error import FFmpegError

    try:
        with _File(path) as file, av.open(file, "r", format=demuxer) as container:
            yield container, _decodable(container)
    except (FFmpegError, OSError) as error:
        raise AudioError(f"FFmpeg: {error.strerror}") from error
    except ValueError as error:
        raise error if isinstance(error, AudioError) else AudioError(f"FFmpeg: {error}") from error


def _decodable(container: "InputContainer") -> "AudioStream":
    from av.error import FFmpegError

    if not container.streams.audio:
        raise AudioError("holds no audio track")
    for stream in container.streams.audio:
        try:
            stream.codec_context.open(strict=False)
        except (FFmpegError, ValueError, AttributeError):
            continue
        return stream
    num_tracks = len(container.streams.audio)
    raise AudioError(f"FFmpeg has no decoder for its audio ({num_tracks} track{'s' * (num_tracks > 1)})")


class FfmpegSound:
    """A track of a file.

    Attributes:
        rate_hz: samples per second.
        num_channels: of the file.
        num_frames: the length that the container declares, or None.
    """

    exact = False  # whether its samples are 16 kHz, mono, int16

    def __init__(self, path: Path, demuxer: str):
        """Look at the file. Raises AudioError if it has no track that can be decoded, or PyAV is missing."""
        if not has_pyav():
            raise AudioError(f"is in a format that needs PyAV ({demuxer}): {EXTRA}")
        self._path, self._demuxer = path, demuxer
        with _open_track(path, demuxer) as (container, stream):
            check_format(stream.rate, stream.codec_context.channels)
            self.rate_hz, self.num_channels = stream.rate, stream.codec_context.channels
            self.num_frames, self._slack = _declared(container, stream)
            self._tells_padding = bool(stream.duration)  # only a track's own length tells what its encoder padded

    def blocks(self, first: int, most: int | None) -> Iterator[np.ndarray]:
        """Decode float32 [C, S] from frame `first`: `most` frames, or all. Raises AudioError if they are not there."""
        declared, slack = self.num_frames, self._slack
        to_the_end = most is None or (declared is not None and first + most >= declared)
        num_read = 0
        limit = most if self._tells_padding or not to_the_end else None
        for audio_CS in self._from(first):
            left = audio_CS.shape[1] if limit is None else max(0, limit - num_read)
            num_read += audio_CS.shape[1]
            if left:
                yield audio_CS[:, :left]
            if most is not None and num_read >= most + (slack + 1 if to_the_end else 0):
                break
        if most is None or declared is None:
            return
        if num_read < most - (slack if first + most + slack >= declared else 0):
            raise AudioError(f"is truncated: it declares {declared} frames and ends after {first + num_read}")
        if to_the_end and num_read > most + slack:
            raise AudioError(f"holds more than the {declared} frames that it declares")

    def _from(self, first: int) -> Iterator[np.ndarray]:
        """Decode from frame `first` to the end, float32 [C, S] a piece."""
        with _open_track(self._path, self._demuxer) as (container, stream):
            seeks = bool(first and self._demuxer in SEEKING)
            if seeks and stream.time_base:
                offset = max(0, int((first / self.rate_hz - PREROLL_S) / stream.time_base))
                container.seek(offset, stream=stream)
            for position, audio_CS in self._placed(container, stream, seeks):
                skipped = max(0, first - position)
                if skipped < audio_CS.shape[1]:
                    yield audio_CS[:, skipped:]

    def _placed(
        self, container: "InputContainer", stream: "AudioStream", sought: bool
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (number of its first frame, float32 [C, S]) for every piece that is decoded."""
        import av

        to_planar_float = av.AudioResampler(format="fltp")
        position = None if sought else 0
        for frame in container.decode(stream):
            if frame.sample_rate != self.rate_hz:
                raise AudioError(f"changes its rate from {self.rate_hz} to {frame.sample_rate} Hz")
            if position is None:
                if frame.time is None:
                    raise AudioError("has no time stamps, so no part can be cut from it")
                position = round(frame.time * self.rate_hz)
            audio_CS = np.concatenate([part.to_ndarray() for part in to_planar_float.resample(frame)], axis=1)
            if len(audio_CS) != self.num_channels:
                raise AudioError(f"changes its channels from {self.num_channels} to {len(audio_CS)}")
            yield position, audio_CS
            position += audio_CS.shape[1]


def _declared(container: "InputContainer", stream: "AudioStream") -> tuple[int | None, int]:
    """Return the length that the container declares, or None, and its possible error, in frames."""
    if container.format.name in NO_LENGTH:
        return None, 0
    if stream.duration and stream.time_base:
        return round(stream.duration * stream.time_base * stream.rate), TRACK_SLACK_FRAMES
    if container.duration:
        slack = round(CONTAINER_SLACK_S * stream.rate) if len(container.streams) > 1 else TRACK_SLACK_FRAMES
        return round(container.duration * stream.rate / MICROSECONDS), slack
    return None, 0
