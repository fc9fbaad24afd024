"""Make mutants of encoded sounds: mutant K of a seed is the same bytes at any time and in any process.

Half of the mutations know the format's header: they set a field (a size, a count, a rate, a number of channels) to
0, 1, its largest value, or near what it was. The others flip bits, overwrite, cut, repeat, and join two formats.
"""

import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from encoders import FORMATS, sound, with_checksums

SECONDS = 0.6  # of a sound that is changed
HEADER_BYTES = 64  # whose every field is set in formats that have no walker below


class Field(NamedTuple):
    """A number in a file."""

    place: int
    size: int  # bytes
    order: Literal["little", "big"]


class Mutant(NamedTuple):
    """A changed file."""

    format_name: str
    extension: str
    changes: tuple[str, ...]
    content: bytes


@lru_cache(maxsize=len(FORMATS))
def original(number: int) -> bytes:
    """Return the sound in a format, unchanged."""
    its = FORMATS[number]
    return its.bytes_of(sound(SECONDS, its.rate_hz, its.channels, number))


def mutant(seed: int, number: int) -> Mutant:
    """Make mutant `number` of a seed; the formats take turns."""
    rng = np.random.default_rng([seed, number])
    its = FORMATS[number % len(FORMATS)]
    content, changes = original(number % len(FORMATS)), []
    for _ in range(rng.integers(1, 4)):
        change = FIELD_CHANGE if rng.random() < 0.5 else CHANGES[rng.integers(len(CHANGES))]
        content = change(content, rng)
        changes.append(change.__name__)
    if content.startswith(b"OggS") and rng.random() < 0.8:
        content = with_checksums(content)
    return Mutant(its.name, its.extension, tuple(changes), content)


# ---- changes that know nothing of the format


def flip_bits(content: bytes, rng: np.random.Generator) -> bytes:
    """Flip one to eight bits, half of the time in the header."""
    out = bytearray(content)
    reach = min(len(out), 200) if rng.random() < 0.5 else len(out)
    for place in rng.integers(0, max(1, reach), rng.integers(1, 9)) if out else ():
        out[place] ^= 1 << int(rng.integers(8))
    return bytes(out)


def overwrite(content: bytes, rng: np.random.Generator) -> bytes:
    """Overwrite a stretch by noise, zeros or ones."""
    start, stop = _stretch(content, rng)
    size = stop - start
    return content[:start] + (rng.bytes(size), bytes(size), b"\xff" * size)[rng.integers(3)] + content[stop:]


def cut_off(content: bytes, rng: np.random.Generator) -> bytes:
    """Keep the beginning."""
    return content[: rng.integers(0, len(content) + 1)]


def drop(content: bytes, rng: np.random.Generator) -> bytes:
    """Leave a stretch out."""
    start, stop = _stretch(content, rng)
    return content[:start] + content[stop:]


def repeat(content: bytes, rng: np.random.Generator) -> bytes:
    """Write a stretch twice."""
    start, stop = _stretch(content, rng)
    return content[:stop] + content[start:]


def insert(content: bytes, rng: np.random.Generator) -> bytes:
    """Put zeros or noise somewhere."""
    place, size = int(rng.integers(0, len(content) + 1)), int(rng.integers(1, 5000))
    return content[:place] + (bytes(size) if rng.random() < 0.5 else rng.bytes(size)) + content[place:]


def join_with_other(content: bytes, rng: np.random.Generator) -> bytes:
    """Continue with the end of another format, or with a whole file of it."""
    other = original(int(rng.integers(len(FORMATS))))
    if rng.random() < 0.3:
        return content + other
    return content[: rng.integers(0, len(content) + 1)] + other[rng.integers(0, len(other)) :]


def _stretch(content: bytes, rng: np.random.Generator) -> tuple[int, int]:
    start = int(rng.integers(0, len(content) + 1))
    return start, min(len(content), start + int(2 ** rng.uniform(0, 12)))


CHANGES: tuple[Callable[[bytes, np.random.Generator], bytes], ...] = (
    *(flip_bits, overwrite, cut_off, drop),
    *(repeat, insert, join_with_other),
)

# ---- changes of a header's fields


def set_fields(content: bytes, rng: np.random.Generator) -> bytes:
    """Set one to three fields of the header to extreme or neighbouring values."""
    if content.startswith(b"NIST"):
        return _set_number_in_text(content, rng)
    out, fields = bytearray(content), [its for its in fields_of(content) if its.place + its.size <= len(content)]
    for _ in range(rng.integers(1, 4)) if fields else ():
        field = fields[rng.integers(len(fields))]
        stretch = slice(field.place, field.place + field.size)
        now, most = int.from_bytes(out[stretch], field.order), (1 << 8 * field.size) - 1
        choices = (0, 1, 2, most, most - 1, most >> 1, (most >> 1) + 1, now + 1, now - 1, 2 * now, now // 2)
        choices += (len(content), len(content) - field.place, int.from_bytes(rng.bytes(field.size), "big"))
        out[stretch] = (choices[rng.integers(len(choices))] & most).to_bytes(field.size, field.order)
    return bytes(out)


FIELD_CHANGE = set_fields
NUMBERS = (b"0", b"1", b"-1", b"2147483647", b"4294967296", b"99999999999999999999", b"x", b"", b"1e9")


def _set_number_in_text(content: bytes, rng: np.random.Generator) -> bytes:
    found = list(re.finditer(rb"\d+", content[:1024]))
    match = found[rng.integers(len(found))]
    changed = content[: match.start()] + NUMBERS[rng.integers(len(NUMBERS))] + content[match.end() : 1024]
    return changed[:1024].ljust(1024) + content[1024:] if rng.random() < 0.7 else changed + content[1024:]


def fields_of(content: bytes) -> list[Field]:
    """Find the numbers in a file's headers."""
    for magic, place, walk in WALKERS:
        if content[place:].startswith(magic):
            return list(walk(content))
    sizes = (1, 2, 4)
    orders: tuple[Literal["little", "big"], ...] = ("little", "big")
    return [Field(at, size, order) for size in sizes for at in range(4, HEADER_BYTES, size) for order in orders]


def _row(start: int, sizes: tuple[int, ...], order: Literal["little", "big"]) -> Iterator[Field]:
    """Yield fields that follow each other."""
    for size in sizes:
        yield Field(start, size, order)
        start += size


FMT_SIZES = (2, 2, 4, 4, 2, 2, 2, 2, 2, 2)
RIFF_CHUNKS = {b"fmt ": FMT_SIZES, b"ds64": (8, 8, 8, 4), b"fact": (4,)}
AIFF_CHUNKS = {b"COMM": (2, 4, 2, 2, 8, 4), b"SSND": (4, 4)}
CAF_CHUNKS = {b"desc": (8, 4, 4, 4, 4, 4, 4), b"pakt": (8, 8, 4, 4), b"kuki": (4, 4, 4, 4, 4, 4, 4, 4), b"data": (4,)}


def _riff(content: bytes) -> Iterator[Field]:
    order = "big" if content.startswith(b"FORM") else "little"
    contents = AIFF_CHUNKS if order == "big" else RIFF_CHUNKS
    yield Field(4, 4, order)
    place = 12
    while place + 8 <= len(content):
        yield Field(place + 4, 4, order)
        yield from _row(place + 8, contents.get(content[place : place + 4], ()), order)
        size = int.from_bytes(content[place + 4 : place + 8], order)
        place += 8 + size + size % 2


def _caf(content: bytes) -> Iterator[Field]:
    yield from _row(4, (2, 2), "big")
    place = 8
    while place + 12 <= len(content):
        yield Field(place + 4, 8, "big")
        yield from _row(place + 12, CAF_CHUNKS.get(content[place : place + 4], ()), "big")
        place += 12 + int.from_bytes(content[place + 4 : place + 12], "big")


def _w64(content: bytes) -> Iterator[Field]:
    yield Field(16, 8, "little")
    place = 40
    while place + 24 <= len(content):
        yield Field(place + 16, 8, "little")
        if content[place : place + 4] == b"fmt ":
            yield from _row(place + 24, FMT_SIZES, "little")
        place += max(24, int.from_bytes(content[place + 16 : place + 24], "little") + 7 & ~7)


def _au(_content: bytes) -> Iterator[Field]:
    return _row(4, (4, 4, 4, 4, 4), "big")


def _flac(content: bytes) -> Iterator[Field]:
    yield from _row(4, (1, 3, 2, 2, 3, 3, 3, 1, 5), "big")  # the last three: rate with channels and bits, total
    for match in re.finditer(rb"\xff[\xf8\xf9]", content):
        yield from _row(match.start() + 2, (1, 1, 1, 1, 1), "big")


def _ogg(content: bytes) -> Iterator[Field]:
    for match in re.finditer(b"OggS", content):
        yield from _row(match.start() + 4, (1, 1, 8, 4, 4, 4, 1, 1), "little")
    if content[28:].startswith(b"\x01vorbis"):
        yield from _row(35, (4, 1, 4, 4, 4, 4, 1), "little")
    elif content[28:].startswith(b"OpusHead"):
        yield from _row(36, (1, 1, 2, 4, 2, 1), "little")
    else:
        yield from _row(28 + 9 + 8, (2, 2, 3, 3, 3, 1, 5), "big")  # FLAC's


def _mpeg(content: bytes) -> Iterator[Field]:
    for match in re.finditer(rb"\xff[\xe2-\xff]|\x0b\x77", content):
        yield from _row(match.start() + 1, (1, 1, 1, 1, 1, 1), "big")
    for match in re.finditer(b"Xing|Info|VBRI", content):
        yield from _row(match.start() + 4, (4, 4, 4, 2, 2, 2, 4), "big")
        yield from _row(match.start() + 120, (9, 1, 1, 1, 3, 3, 1, 1), "big")  # LAME's


BOXES = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"moof", b"traf", b"mvex", b"dinf")
NO_NUMBERS = (b"mdat", b"free", b"udta", b"ftyp")


def _boxes(content: bytes, start: int = 0, stop: int | None = None) -> Iterator[Field]:
    stop = len(content) if stop is None else stop
    while start + 8 <= stop:
        yield Field(start, 4, "big")
        size, name = int.from_bytes(content[start : start + 4], "big"), content[start + 4 : start + 8]
        end = min(stop, start + size) if size >= 8 else stop
        if name in BOXES:
            yield from _boxes(content, start + 8, end)
        elif name not in NO_NUMBERS:
            yield from (Field(place, 4, "big") for place in range(start + 8, min(end - 3, start + 120), 4))
            yield from (Field(place, 2, "big") for place in range(start + 8, min(end - 1, start + 60), 2))
        start = end


EBML_MASTERS = {0x1A45DFA3, 0x18538067, 0x1549A966, 0x1654AE6B, 0xAE, 0xE1, 0x1F43B675, 0xA0, 0x114D9B74, 0x4DBB}


def _ebml(content: bytes, start: int = 0, stop: int | None = None) -> Iterator[Field]:
    stop = len(content) if stop is None else stop
    while start + 2 <= stop:
        id_bytes = 9 - content[start].bit_length()
        name = int.from_bytes(content[start : start + id_bytes], "big")
        at = start + id_bytes
        size_bytes = 9 - content[at].bit_length() if at < stop else 1
        if id_bytes > 4 or size_bytes > 8:
            return
        yield Field(at, size_bytes, "big")
        size = int.from_bytes(content[at : at + size_bytes], "big") & (1 << 7 * size_bytes) - 1
        start, end = at + size_bytes, min(stop, at + size_bytes + size)
        if name in EBML_MASTERS:
            yield from _ebml(content, start, end)
        elif 0 < size <= 8:
            yield Field(start, size, "big")
        else:
            yield from _row(start, (1, 2, 1), "big")  # of a block: track, time, flags
        start = end


def _asf(content: bytes) -> Iterator[Field]:
    header = int.from_bytes(content[16:24], "little")
    yield from _row(16, (8, 4, 1, 1), "little")
    place = 30
    while place + 24 <= min(len(content), header + 200):
        yield Field(place + 16, 8, "little")
        size = max(24, int.from_bytes(content[place + 16 : place + 24], "little"))
        yield from (Field(at, 4, "little") for at in range(place + 24, min(place + size, place + 120), 4))
        yield from (Field(at, 2, "little") for at in range(place + 24, min(place + size, place + 120), 2))
        place += size


def _wavpack(content: bytes) -> Iterator[Field]:
    for match in re.finditer(b"wvpk", content):
        yield from _row(match.start() + 4, (4, 2, 1, 1, 4, 4, 4, 4, 4, 1, 1), "little")


WALKERS: tuple[tuple[bytes, int, Callable[[bytes], Iterator[Field]]], ...] = (
    *((magic, 0, _riff) for magic in (b"RIFF", b"RF64", b"BW64", b"FORM")),
    (b"caff", 0, _caf),
    (b"riff", 0, _w64),
    (b".snd", 0, _au),
    (b"fLaC", 0, _flac),
    (b"OggS", 0, _ogg),
    (b"ftyp", 4, _boxes),
    (b"\x1a\x45\xdf\xa3", 0, _ebml),
    (b"\x30\x26\xb2\x75", 0, _asf),
    (b"wvpk", 0, _wavpack),
    (b"ID3", 0, _mpeg),
    *((sync, 0, _mpeg) for sync in (b"\xff", b"\x0b\x77")),
)
