"""asda: audio self-supervised learning with differential attention, from tar shards to tags."""

__version__ = "0.1.0"
