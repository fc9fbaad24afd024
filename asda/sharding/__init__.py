"""Turns audio files into shards: sources -> plan -> writer, with a journal that survives kills.

The same clips make the same bytes. Training reads finished shards and never opens this room.
"""
