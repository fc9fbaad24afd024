"""Cut long recordings into clips before the shards are planned. Only lengths are read here; see Place.cut."""

from collections.abc import Iterator
from dataclasses import replace

from asda.data.audio.read import count_frames
from asda.data.audio.waves import MIN_SAMPLES, AudioError, part_of, resampled_length
from asda.errors import UserError
from asda.sharding.audio_ref import Place, audio_file
from asda.sharding.sources.listing import Listing, Row
from asda.sharding.sources.tables import cut_row
from asda.sharding.workers import worker_pool

AT_ONCE = 32  # lengths that a worker reads before it returns them
Pieces = list[tuple[float, float]]  # start and stop in a recording, seconds


def with_channel(listing: Listing, channel: int | None) -> Listing:
    """Choose the channel of every clip, counted from 0; None is the mean of all."""
    if channel is None:
        return listing
    return replace(listing, rows=[replace(row, place=replace(row.place, channel=channel)) for row in listing.rows])


def cut_recordings(listing: Listing, seconds: float | None, num_workers: int) -> Listing:
    """Cut what lasts longer than `seconds` into consecutive clips of that length; the last one is the rest.

    A clip is named by its recording and its times: a/b.wav becomes a/b:0-10.wav, a/b:10-20.wav. A rest that is
    shorter than 25 ms is left out and counted. Recordings that cannot be read are added to `missing`.

    Raises:
        UserError: clips lie in HDF5 packs, or none can be read.
    """
    if seconds is None:
        return listing
    if packed := next((row for row in listing.rows if row.place.in_pack), None):
        raise UserError(f"--cut: {packed.where} is an HDF5 pack, whose clips are cut already; leave --cut out")
    places = [row.place for row in listing.rows]
    with worker_pool(num_workers, -(-len(places) // AT_ONCE)) as workers:
        found = list(workers.pool.map(_pieces, places, [seconds] * len(places), chunksize=AT_ONCE))
    rows: list[Row] = []
    missing = list(listing.missing)
    num_rests = 0
    for row, pieces in zip(listing.rows, found, strict=True):
        if isinstance(pieces, str):
            missing.append((row.relative, pieces))
            continue
        num_rests += pieces[1]
        rows += _cut(row, pieces[0]) if pieces[0] else [row]
    if not rows:
        raise UserError(f"--cut: none of {len(missing)} recordings can be read; the first is {': '.join(missing[0])}")
    rests = {"rests of recordings that are shorter than 25 ms": num_rests}
    return replace(listing, rows=rows, missing=missing, left_out=listing.left_out | rests)


def _pieces(place: Place, seconds: float) -> tuple[Pieces, int] | str:
    """Return the clips of a recording, none if it is not longer than one, and the number of rests; or the reason."""
    try:
        with audio_file(place) as path:
            num_frames, rate_hz = count_frames(path)
        segment = None if place.stop_s is None else (place.start_s, place.stop_s, place.exact)
        first, num_frames = part_of(num_frames, rate_hz, segment)
    except AudioError as error:
        return str(error)
    size = round(seconds * rate_hz)
    if num_frames <= size:
        return [], 0
    bounds = [(start, min(start + size, num_frames)) for start in range(0, num_frames, size)]
    long_enough = [b for b in bounds if resampled_length(b[1] - b[0], rate_hz) >= MIN_SAMPLES]
    pieces = [((first + start) / rate_hz, (first + stop) / rate_hz) for start, stop in long_enough]
    return pieces, len(bounds) - len(pieces)


def _cut(row: Row, pieces: Pieces) -> Iterator[Row]:
    for times in pieces:
        relative, place = cut_row(row.relative, row.place, times)
        yield replace(row, relative=relative, place=place)
