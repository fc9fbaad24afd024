"""From audio files to batches: audio -> sources -> writer -> shards on disk -> log-mel patches."""
