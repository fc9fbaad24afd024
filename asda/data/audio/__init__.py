"""Reads audio files as 16 kHz samples. Training reads shards and never opens this room."""
