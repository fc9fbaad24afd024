"""From shards to batches: storage -> clips -> order -> stream -> log-mel patches."""
