"""Reads shards and their indexes: no byte is used before its hash agrees. Training can be changed without it."""
