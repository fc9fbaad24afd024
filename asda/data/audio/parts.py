"""Find what a file holds, whatever its header says: the sounds in it, each as bytes that libsndfile reads whole.

libsndfile believes a header or an estimate: it stops at the estimated end of an MP3 without a count, at the first of
two joined files, at half of a FLAC that says so, and reads nothing of a WAV whose writer died. Here the frames, pages
and chunks are followed instead. A part is the file's own bytes, with a header of ours where its own is wrong.

    as it is       the header agrees with the bytes, or the format is not one of those below
    MP3            its frames are counted; joined files are parts; a part without a right Xing count gets one
    Ogg            the links of a chain are parts
    FLAC           its last frame tells the length; joined files are parts
    WAV, AIFF, CAF sizes of 0, stale, unknown or beyond 4 GiB are computed from what is there; BW64 is RF64

Sources: ISO 11172-3 and 13818-3 (frames), the Xing and VBRI headers as LAME and Fraunhofer write them, RFC 3533 (Ogg),
RFC 9639 (FLAC), EBU Tech 3306 and ITU-R BS.2088 (RF64, BW64), Apple's AIFF and CAF
specifications.
"""

import io
import mmap
import os
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO, NamedTuple

from asda.data.audio.waves import AudioError

LARGEST_SIZE = 1 << 32  # of a chunk in RIFF and AIFF
UNKNOWN_SIZE_BYTES = 0x7FFF_0000  # from here on a declared size is a streaming writer's "unknown"
STEP_BYTES = 1 << 24  # that are kept in memory while a file is looked through
JUNK_BYTES = 1 << 16  # most that is skipped before the first frame of an MP3, and looked through between two
RESYNC_BYTES = 1000  # libmpg123 finds the next frame by itself behind fewer bytes


class View(mmap.mmap):
    """The bytes of a file; those that were looked at leave memory when they are forgotten."""

    _kept = 0  # bytes before it are forgotten

    def forget(self, place: int) -> None:
        """Release the memory of what lies before a place; it can be read again."""
        begin = place // STEP_BYTES * STEP_BYTES
        if begin > self._kept:
            self.madvise(mmap.MADV_DONTNEED, self._kept, begin - self._kept)
            self._kept = begin

    def places(self, pattern: bytes) -> Iterator[int]:
        """Yield every place of a pattern."""
        for begin in range(0, len(self), STEP_BYTES):
            end = begin + STEP_BYTES + len(pattern) - 1
            place = self.find(pattern, begin, end)
            while place >= 0:
                yield place
                place = self.find(pattern, place + 1, end)
            self.madvise(mmap.MADV_DONTNEED, begin, min(STEP_BYTES, len(self) - begin))


@dataclass(frozen=True)
class Part:
    """One sound of a file: bytes of ours, and stretches of the file as (start, stop)."""

    pieces: tuple[bytes | tuple[int, int], ...]


class PartFile(io.RawIOBase):
    """A part as a file that can be read and sought."""

    def __init__(self, part: Part, file: BinaryIO):
        self._pieces, self._file, self._place = part.pieces, file, 0
        sizes = [len(piece) if isinstance(piece, bytes) else piece[1] - piece[0] for piece in part.pieces]
        self._starts = [0, *accumulate(sizes)]

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the place in the part."""
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move, as files do."""
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._starts[-1]}[whence]
        self._place = max(0, origin + offset)
        return self._place

    def readinto(self, buffer: "memoryview | bytearray") -> int:  # type: ignore[override]
        """Fill the buffer as far as the part goes; return the number of bytes."""
        out, filled = memoryview(buffer).cast("B"), 0
        while filled < len(out) and self._place < self._starts[-1]:
            number = bisect_right(self._starts, self._place) - 1
            skip, piece = self._place - self._starts[number], self._pieces[number]
            most = min(len(out) - filled, self._starts[number + 1] - self._place)
            if isinstance(piece, bytes):
                content = piece[skip : skip + most]
            else:
                self._file.seek(piece[0] + skip)
                content = self._file.read(most)
            if not content:
                break
            out[filled : filled + len(content)] = content
            filled, self._place = filled + len(content), self._place + len(content)
        return filled


def parts_of(path: Path) -> tuple[Part, ...]:
    """Return the sounds of a file in order, or () if it is read best as it is. Raises AudioError and OSError."""
    status = path.stat()
    return _parts(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)  # clips that are cut from one recording follow each other
def _parts(path: Path, size: int, _modified_ns: int) -> tuple[Part, ...]:
    if size < 12:
        return ()
    with path.open("rb") as file, View(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        head = view[:4]
        if head in (b"RIFF", b"RF64", b"BW64"):
            return _wav_parts(view)
        if head == b"FORM":
            return _aiff_parts(view)
        if head == b"caff":
            return _caf_parts(view)
        if head == b"fLaC":
            return _flac_parts(view)
        if head == b"OggS":
            return _ogg_parts(view)
        if view[(place := _behind_tags(view, 0)) : place + 4] == b"fLaC":
            return _flac_parts(view)
        may_be_mpeg = head[:3] == b"ID3" or head.lstrip(b"\0")[:1] in (b"", b"\xff")  # zeros may stand before it
        return _mpeg_parts(view) if may_be_mpeg else ()


# ---- WAV and AIFF


class _Chunk(NamedTuple):
    name: bytes
    start: int  # of its content
    declared: int  # bytes


def _chunks(view: View, order: str) -> Iterator[_Chunk]:
    """Follow the chunks of a RIFF or IFF file as their sizes lead."""
    place = 12
    while place + 8 <= len(view) and view[place : place + 4].isascii():
        chunk = _Chunk(view[place : place + 4], place + 8, int.from_bytes(view[place + 4 : place + 8], order))  # type: ignore[arg-type]
        yield chunk
        place = chunk.start + chunk.declared + chunk.declared % 2


def _wav_parts(view: View) -> tuple[Part, ...]:
    riff_stop = 8 + int.from_bytes(view[4:8], "little")
    fmt = long_size = b""
    for chunk in _chunks(view, "little"):
        if chunk.name == b"fmt ":
            fmt = view[chunk.start : chunk.start + chunk.declared]
        elif chunk.name == b"ds64":
            long_size = view[chunk.start : chunk.start + 16]
        elif chunk.name == b"data":
            break
    else:
        return ()
    if view[:4] != b"RIFF":
        declared = int.from_bytes(long_size[8:16], "little")
        riff_stop = 8 + int.from_bytes(long_size[:8], "little")
    else:
        declared = chunk.declared
    num_bytes = _data_bytes(view, chunk.start, declared, riff_stop)
    if num_bytes is None or len(fmt) < 16:
        return (Part((b"RF64", (4, len(view)))),) if view[:4] == b"BW64" else ()
    num_bytes -= num_bytes % max(1, int.from_bytes(fmt[12:14], "little"))  # whole frames
    ds64 = (20 + 36 + 8 + len(fmt) + num_bytes).to_bytes(8, "little") + num_bytes.to_bytes(8, "little") + bytes(12)
    unknown = b"\xff" * 4
    header = b"RF64" + unknown + b"WAVEds64" + len(ds64).to_bytes(4, "little") + ds64
    header += b"fmt " + len(fmt).to_bytes(4, "little") + fmt + b"data" + unknown
    return (Part((header, (chunk.start, chunk.start + num_bytes))),)


def _data_bytes(view: View, start: int, declared: int, whole_stop: int) -> int | None:
    """Return how many bytes of samples there are if the header is wrong about it, else None.

    Args:
        view: the file.
        start: of the samples.
        declared: their bytes, as the header says.
        whole_stop: where the header says that the file ends.
    """
    there = len(view) - start
    if declared >= min(there, UNKNOWN_SIZE_BYTES):
        return None if declared >= there or declared >= LARGEST_SIZE - 1 or there < LARGEST_SIZE else there
    if there - declared >= LARGEST_SIZE:  # the size has wrapped around
        return declared + (there - declared) // LARGEST_SIZE * LARGEST_SIZE
    stop = start + declared
    # Trusted if other chunks follow to the end, or the file is said to go on to its end.
    if whole_stop > stop + 8 or _is_no_sound(view, stop):
        return None
    return there


def _is_no_sound(view: View, start: int) -> bool:
    """Return whether the rest of a file is a tag, padding, or chunks that nobody counted."""
    rest = view[start : start + 8]
    if len(rest) < 8 or rest.startswith((b"ID3", b"TAG", b"APETAGEX")):
        return True
    if rest[:4].isalnum() and int.from_bytes(rest[4:8], "little") <= len(view) - start:
        return True
    return not any(any(view[place : place + (1 << 20)]) for place in range(start, len(view), 1 << 20))


def _aiff_parts(view: View) -> tuple[Part, ...]:
    common = sound = None
    for chunk in _chunks(view, "big"):
        common = chunk if chunk.name == b"COMM" else common
        if chunk.name == b"SSND":
            sound = chunk
            break
    if common is None or sound is None or common.declared < 18:
        return ()
    channels, frames, bits = (int.from_bytes(view[common.start + at : common.start + at + size], "big")
                              for at, size in ((0, 2), (2, 4), (6, 2)))  # fmt: skip
    if common.declared > 18 and view[common.start + 18 : common.start + 22] not in (b"NONE", b"sowt", b"twos"):
        return ()  # compressed: frames are not bytes
    frame_bytes = max(1, channels * -(-bits // 8))
    start = sound.start + 8  # behind offset and block size
    declared = max(0, sound.declared - 8)
    num_bytes = _data_bytes(view, start, declared, 8 + int.from_bytes(view[4:8], "big"))
    if num_bytes is None and frames * frame_bytes < declared and declared <= len(view) - start:
        num_bytes = declared  # the count of frames alone is stale
    if num_bytes is None or num_bytes >= LARGEST_SIZE - start:
        return ()
    fields = {
        4: start + num_bytes - 8,
        common.start + 2: num_bytes // frame_bytes,
        sound.start - 4: num_bytes // frame_bytes * frame_bytes + 8,
    }
    return (_patched({at: value.to_bytes(4, "big") for at, value in fields.items()}, 0, len(view)),)


def _caf_parts(view: View) -> tuple[Part, ...]:
    place = 8
    while place + 12 <= len(view):
        size = int.from_bytes(view[place + 4 : place + 12], "big", signed=True)
        if view[place : place + 4] == b"data":
            there = len(view) - place - 12
            field = {place + 4: there.to_bytes(8, "big")}
            return (_patched(field, 0, len(view)),) if size == -1 else ()  # the last chunk may leave its size open
        place += 12 + max(0, size)
    return ()


def _patched(patches: dict[int, bytes], start: int, stop: int) -> Part:
    """Return a stretch of the file with some bytes replaced."""
    pieces: list[bytes | tuple[int, int]] = []
    for at, content in sorted(patches.items()):
        pieces += [(start, at), content]
        start = at + len(content)
    return Part((*pieces, (start, stop)))


# ---- FLAC

STREAM_INFO = (b"fLaC\x00\x00\x00\x22", b"fLaC\x80\x00\x00\x22")
FLAC_HEADER_BYTES = 16  # of a frame, at most
FLAC_SIZES = {1: 192, **{n: 576 << n - 2 for n in range(2, 6)}, **{n: 256 << n - 8 for n in range(8, 16)}}


def _flac_parts(view: View) -> tuple[Part, ...]:
    starts = sorted(place for magic in STREAM_INFO for place in view.places(magic))
    parts, mended = [], len(starts) > 1
    for start, stop in zip(starts, [*starts, len(view)][1:], strict=True):
        declared = int.from_bytes(view[start + 21 : start + 26], "big") & (1 << 36) - 1
        total = _flac_samples(view, start, stop, declared)
        if total is None or total == declared or (declared and total < declared):
            parts.append(Part(((start, stop),)))
            continue
        mended = True
        field = (view[start + 21] & 0xF0 | total >> 32).to_bytes(1, "big") + (total & 0xFFFFFFFF).to_bytes(4, "big")
        parts.append(_patched({start + 21: field}, start, stop))
    return tuple(parts) if mended else ()


def _flac_samples(view: View, start: int, stop: int, declared: int) -> int | None:
    """Return the number of samples up to the end of the last frame; None if the file does not end with a frame."""
    if view[max(start, stop - 128) : stop][:3] == b"TAG":
        stop -= 128
    size_bounds = [int.from_bytes(view[start + at : start + at + 2], "big") for at in (8, 10)]
    largest = int.from_bytes(view[start + 15 : start + 18], "big") or 1 << 17
    begin = max(start + 42, stop - largest - FLAC_HEADER_BYTES)
    tail, place = view[begin:stop], stop - begin
    while (place := max(tail.rfind(b"\xff\xf8", 0, place), tail.rfind(b"\xff\xf9", 0, place))) >= 0:
        total = _flac_frame_end(tail[place : place + FLAC_HEADER_BYTES], size_bounds[1])
        if total is not None and (total == declared or _crc(tail[place:], 16, 0x8005) == 0):
            return total
    return None


def _flac_frame_end(head: bytes, block_size: int) -> int | None:
    """Return the number of the sample behind a frame, from its header; None if this is no header."""
    if len(head) < 6 or head[2] >> 4 == 0 or head[3] & 1 or head[3] >> 4 > 10:
        return None
    length = 1 if head[4] < 0x80 else 8 - (head[4] ^ 0xFF).bit_length()
    if (length == 1 and head[4] >= 0x80) or length > 7:
        return None
    number = head[4] & (0x7F if length == 1 else (0x7F >> length))
    for byte in head[5 : 4 + length]:
        number = number << 6 | byte & 0x3F
    place, code = 4 + length, head[2] >> 4
    size = FLAC_SIZES.get(code, 0)
    if code in (6, 7):
        size = int.from_bytes(head[place : place + code - 5], "big") + 1
        place += code - 5
    place += {12: 1, 13: 2, 14: 2}.get(head[2] & 15, 0)
    if place >= len(head) or _crc(head[:place], 8, 0x07) != head[place]:
        return None
    return number + size if head[1] & 1 else number * block_size + size


def _crc(content: bytes, bits: int, polynomial: int) -> int:
    """Return a checksum of FLAC's: the highest bit first, from 0."""
    table, mask = _crc_table(bits, polynomial), (1 << bits) - 1
    value = 0
    for byte in content:
        value = table[(value >> bits - 8) ^ byte] ^ (value << 8 & mask)
    return value


@lru_cache
def _crc_table(bits: int, polynomial: int) -> list[int]:
    table = []
    for byte in range(256):
        value = byte << bits - 8
        for _ in range(8):
            value = value << 1 ^ (polynomial if value >> bits - 1 else 0)
            value &= (1 << bits) - 1
        table.append(value)
    return table


# ---- Ogg


def _ogg_parts(view: View) -> tuple[Part, ...]:
    """Split a chain at the pages that begin a stream; several streams side by side begin one right after another."""
    starts: list[int] = []
    follows = 0  # where the page after the last first page begins
    for place in view.places(b"OggS\x00\x02"):
        if place != follows or not starts:
            starts.append(place)
        segments = view[place + 26] if place + 27 <= len(view) else 0
        follows = place + 27 + segments + sum(view[place + 27 : place + 27 + segments])
    if len(starts) < 2:
        return ()
    return tuple(Part(((start, stop),)) for start, stop in zip(starts, [*starts[1:], len(view)], strict=True))


# ---- MPEG audio

BIT_RATES = {  # kbit/s of layer 3, by version 1 or 2
    1: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
MPEG_RATES_HZ = (44_100, 48_000, 32_000)
SAME_STREAM = 0xFFFE0C00  # bits of a header that all frames of a stream share: sync, version, layer, rate
VBRI_PLACE = 36  # in a frame


class MpegFrame(NamedTuple):
    """Sizes that a frame's header tells."""

    num_bytes: int
    info_place: int  # where a Xing header would stand in the frame


class _MpegPart:
    """Frames that follow each other, after a frame that describes them if there is one."""

    def __init__(self, start: int):
        self.start = self.stop = start
        self.num_frames = 0  # with sound
        self.info: tuple[int, int] | None = None  # start and stop of the describing frame


@lru_cache(maxsize=4096)
def mpeg_frame(head: bytes) -> MpegFrame | None:
    """Read the four bytes of a header of layer 3; None if they are no header, or one without a bit rate."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE6 != 0xE2:
        return None
    version, rate, bit_rate = head[1] >> 3 & 3, head[2] >> 2 & 3, head[2] >> 4
    if version == 1 or rate == 3 or bit_rate in (0, 15):
        return None
    mpeg1, mono = version == 3, head[3] >> 6 == 3
    rate_hz = MPEG_RATES_HZ[rate] >> {3: 0, 2: 1, 0: 2}[version]
    num_bytes = (144 if mpeg1 else 72) * 1000 * BIT_RATES[1 if mpeg1 else 2][bit_rate] // rate_hz
    side_info = (17 if mono else 32) if mpeg1 else (9 if mono else 17)
    return MpegFrame(num_bytes + (head[2] >> 1 & 1), 4 + side_info)


def mpeg_frames(view: View) -> Iterator[tuple[int, MpegFrame]]:
    """Yield (place, frame) for all frames of a file, across tags and junk."""
    place = _frame_after(view, 0, None)
    stream = None
    while place is not None:
        head = view[place : place + 4]
        frame = mpeg_frame(head)
        value = int.from_bytes(head, "big") & SAME_STREAM
        if frame is None or (stream is not None and value != stream and not _is_frame(view, place, None)):
            place = _frame_after(view, place, stream)
            continue
        stream = value
        if place + frame.num_bytes > len(view):
            return  # cut off
        yield place, frame
        place += frame.num_bytes
        view.forget(place)


def _is_frame(view: View, place: int, stream: int | None) -> bool:
    """Return whether a frame stands here, and one of the same stream, a tag or the end behind it."""
    head = view[place : place + 4]
    frame = mpeg_frame(head)
    if frame is None:
        return False
    value = int.from_bytes(head, "big") & SAME_STREAM
    after = place + frame.num_bytes
    following = view[after : after + 4]
    if stream is not None and value != stream:
        return False
    if after == len(view) or following[:3] in (b"TAG", b"ID3") or following == b"APET":
        return True
    return mpeg_frame(following) is not None and int.from_bytes(following, "big") & SAME_STREAM == value


def _frame_after(view: View, place: int, stream: int | None) -> int | None:
    """Return the place of the next frame, from `place` on; None if there is none within reach."""
    place = _behind_tags(view, place)
    limit = min(len(view), place + JUNK_BYTES)
    while 0 <= place < limit:
        if _is_frame(view, place, stream):
            return place
        place = view.find(b"\xff", place + 1, limit)
    return None


def _behind_tags(view: View, place: int) -> int:
    """Return the place behind the ID3v2 and APE tags that stand here."""
    while view[place : place + 3] == b"ID3" and place + 10 <= len(view):
        sizes = zip(view[place + 6 : place + 10], (21, 14, 7, 0), strict=True)
        place += 10 + sum((byte & 0x7F) << shift for byte, shift in sizes)
    if view[place : place + 8] == b"APETAGEX" and place + 24 <= len(view):
        place += int.from_bytes(view[place + 12 : place + 16], "little") + 32
    return place


def _mpeg_parts(view: View) -> tuple[Part, ...]:
    parts: list[_MpegPart] = []
    for place, frame in mpeg_frames(view):
        info = _describes(view, place, frame)
        if not parts or info or place - parts[-1].stop > RESYNC_BYTES:
            parts.append(_MpegPart(place))
        part = parts[-1]
        part.stop = place + frame.num_bytes
        if info:
            part.info = (place, part.stop)
        else:
            part.num_frames += 1
    parts = [part for part in parts if part.num_frames]
    mended = [_mended_mpeg(view, part) for part in parts]
    if not parts or (len(parts) == 1 and mended[0] is None and parts[0].start == _behind_tags(view, 0)):
        return ()
    return tuple(new or Part(((part.start, part.stop),)) for part, new in zip(parts, mended, strict=True))


def _describes(view: View, place: int, frame: MpegFrame) -> bool:
    at = place + frame.info_place
    return view[at : at + 4] in (b"Xing", b"Info") or view[place + VBRI_PLACE : place + VBRI_PLACE + 4] == b"VBRI"


def _mended_mpeg(view: View, part: _MpegPart) -> Part | None:
    """Return a part with the right count of frames; None if it is right, or too high (the file is cut)."""
    first = mpeg_frame(view[part.start : part.start + 4])
    assert first is not None
    if part.info is None:
        return Part((_info_frame(view, part), (part.start, part.stop)))
    at = part.info[0] + first.info_place
    flags = int.from_bytes(view[at + 4 : at + 8], "big")
    if view[at : at + 4] not in (b"Xing", b"Info") or not flags & 1:  # or VBRI, which libmpg123 does not count by
        return Part((_info_frame(view, part), (part.info[1], part.stop)))
    declared = int.from_bytes(view[at + 8 : at + 12], "big")
    if declared == part.num_frames or declared > part.num_frames + 1:
        return None
    patches = {at + 8: part.num_frames.to_bytes(4, "big")}
    if flags & 2:
        patches[at + 12] = (part.stop - part.start).to_bytes(4, "big")
    return _patched(patches, part.start, part.stop)


def _info_frame(view: View, part: _MpegPart) -> bytes:
    """Make a silent frame that tells how many follow it, in the form of the part's first frame."""
    head = view[part.start : part.start + 4]
    for bit_rate in range(1, 15):  # the smallest that has room
        own = bytes([head[0], head[1] | 1, bit_rate << 4 | head[2] & 0x0C, head[3]])
        frame = mpeg_frame(own)
        if frame and frame.num_bytes >= frame.info_place + 12:
            content = own + bytes(frame.info_place - 4) + b"Info" + (1).to_bytes(4, "big")
            return (content + part.num_frames.to_bytes(4, "big")).ljust(frame.num_bytes, b"\0")
    raise AudioError("is MPEG audio of an unknown form")
