"""Shards and their indexes as a reader sees them: each frame is verified before it is used."""
