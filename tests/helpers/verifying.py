"""Refuses a shard for the first thing that is wrong with it."""

from asda.data.shards.index import DatasetIndex, ShardEntry
from asda.data.shards.read import ShardFile
from asda.errors import UserError
from asda.sharding.verify import shard_problems


def verify_shard(dataset: DatasetIndex, entry: ShardEntry) -> None:
    for problem in shard_problems(ShardFile(dataset.folder, entry), dataset.vocabulary):
        raise UserError(problem)
