"""Audio files to samples: find, read, resample. Training reads shards and never opens this room."""
