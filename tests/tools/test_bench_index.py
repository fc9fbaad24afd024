"""The benchmark of large indexes, at a hundredth of its size."""

import bench_index

from asda.data.clips import ClipDataset


def test_a_million_clips_are_opened_and_any_position_found_within_the_limits() -> None:
    figures = bench_index.bench_index(1_050_000)
    for mode in bench_index.MODES:
        found = figures[mode]
        assert isinstance(found, dict)
        for name in ("open_s", "position_ms", "peak_mib"):  # the slowest of 200 jumps is a matter of the machine's load
            assert found[name] < bench_index.LIMITS[name], (mode, name)


def test_the_index_that_is_measured_is_one_that_opens(tmp_path) -> None:
    bench_index.write_index(tmp_path, 1_000_001)
    dataset = ClipDataset(f"{tmp_path}:train", labelled=True, tolerant=True)
    assert (len(dataset), len(dataset.shards)) == (1_000_001, 3907)
    shard, place = dataset.locate(1_000_000)
    assert (shard.entry.name, shard.entry.clips, place) == ("train-003906.tar.zst", 65, 64)
