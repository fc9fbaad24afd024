"""Audio that only FFmpeg knows: AAC, ALAC or Opus in MP4, M4A, WebM, Matroska or ADTS. By PyAV, the extra `m4a`.

Files are opened as the one format that their first bytes name, and through a file object: FFmpeg opens no other file
and no address that a file may name. Lengths are bounded while decoding, since containers only estimate them.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from asda.data.audio.waves import (
    CUT_SLACK_S,
    MAX_FRAMES,
    AudioError,
    Segment,
    check_format,
    check_length,
    mean_of_channels,
    part_of,
)

if TYPE_CHECKING:
    from av import AudioStream
    from av.container import InputContainer

EXTRA = "pip install 'asda[m4a]'"
PREROLL_S = 0.5  # decoded before a segment and dropped: codecs take up to 80 ms (Opus) to settle
TRACK_SLACK_FRAMES = 8192  # what encoders pad at both ends: up to two AAC frames of 2048 (HE-AAC) each
MICROSECONDS = 1_000_000  # a second, in the unit of a container's duration
CONTAINER_SLACK_S = 1.0  # Matroska declares the length of its longest track, which may be the video


def has_pyav() -> bool:
    """Return whether the extra is installed."""
    return importlib.util.find_spec("av") is not None


def read_compressed(
    path: Path, demuxer: str, max_seconds: float, segment: Segment | None = None
) -> tuple[np.ndarray, int]:
    """Read a file, or the segment of a longer one, as float32 [S] at its own rate, and that rate.

    In Matroska, which counts in milliseconds, a segment may begin one early or late. Raises
    AudioError when the file cannot be used.
    """
    if not has_pyav():
        raise AudioError(f"is AAC, MP4 or WebM, which needs PyAV: {EXTRA}")
    import av
    from av.error import FFmpegError

    try:
        with path.open("rb") as file, av.open(file, "r", format=demuxer) as container:
            if not container.streams.audio:
                raise AudioError("holds no audio track")
            stream = container.streams.audio[0]
            check_format(stream.rate, stream.codec_context.channels)
            return _decode_part(container, stream, max_seconds, segment)
    except (FFmpegError, OSError) as error:
        raise AudioError(f"FFmpeg: {error.strerror}") from error
    except ValueError as error:
        raise error if isinstance(error, AudioError) else AudioError(f"FFmpeg: {error}") from error


def _decode_part(
    container: "InputContainer", stream: "AudioStream", max_seconds: float, segment: Segment | None
) -> tuple[np.ndarray, int]:
    rate_hz = stream.rate
    declared, slack = _declared_frames(container, stream)
    if declared is None:
        return _decode_undeclared(container, stream, max_seconds, segment), rate_hz
    first, num_frames = part_of(declared, rate_hz, segment)
    check_length(num_frames, rate_hz, max_seconds)
    stop = first + num_frames
    beyond = slack + 1 if stop == declared else 0  # is there more than it says?
    wave_S = _decode(container, stream, first, num_frames + beyond)
    if len(wave_S) < num_frames - (slack if stop + slack >= declared else 0):
        raise AudioError(f"is truncated: it declares {declared} frames and ends after {first + len(wave_S)}")
    if len(wave_S) > num_frames + slack:
        raise AudioError(f"holds more than the {declared} frames that it declares")
    check_length(len(wave_S), rate_hz, max_seconds + slack / rate_hz)
    return wave_S[:num_frames] if stream.duration else wave_S, rate_hz


def _declared_frames(container: "InputContainer", stream: "AudioStream") -> tuple[int | None, int]:
    """Return the length of a track that the container declares, or None, and its possible error, in frames."""
    if container.format.name == "aac":
        return None, 0  # FFmpeg guesses one from the first bit rates
    if stream.duration and stream.time_base:
        return round(stream.duration * stream.time_base * stream.rate), TRACK_SLACK_FRAMES
    if container.duration:
        return round(container.duration * stream.rate / MICROSECONDS), round(CONTAINER_SLACK_S * stream.rate)
    return None, 0


def _decode_undeclared(
    container: "InputContainer", stream: "AudioStream", max_seconds: float, segment: Segment | None
) -> np.ndarray:
    """Decode to the end, or as far as it takes to know that the file is too long, or longer than its segment."""
    enough_s = max_seconds if segment is None else max(segment[1], segment[1] - segment[0] + CUT_SLACK_S)
    wave_S = _decode(container, stream, 0, min(int(enough_s * stream.rate), MAX_FRAMES) + 1)
    first, num_frames = part_of(len(wave_S), stream.rate, segment)
    check_length(num_frames, stream.rate, max_seconds)
    return wave_S[first : first + num_frames]


def _decode(container: "InputContainer", stream: "AudioStream", first: int, most: int) -> np.ndarray:
    """Decode up to `most` frames from frame `first`, their channels averaged, float32 [S]."""
    if first and stream.time_base:
        container.seek(max(0, int((first / stream.rate - PREROLL_S) / stream.time_base)), stream=stream)
    pieces = [np.empty(0, np.float32)]
    wanted = first + most
    for position, mono_S in _positioned(container, stream, bool(first)):
        pieces.append(mono_S[max(0, first - position) : max(0, wanted - position)])
        if position + len(mono_S) >= wanted:
            break
    return np.concatenate(pieces)


def _positioned(container: "InputContainer", stream: "AudioStream", sought: bool) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (number of its first frame, the mean of the channels) for every piece that is decoded."""
    import av

    to_planar_float = av.AudioResampler(format="fltp")
    position = None if sought else 0
    for frame in container.decode(stream):
        if frame.sample_rate != stream.rate:
            raise AudioError(f"changes its rate from {stream.rate} to {frame.sample_rate} Hz")
        if position is None:
            if frame.time is None:
                raise AudioError("has no time stamps, so no part can be cut from it")
            position = round(frame.time * stream.rate)
        mono_S = mean_of_channels(np.concatenate([part.to_ndarray() for part in to_planar_float.resample(frame)], 1))
        yield position, mono_S
        position += len(mono_S)
