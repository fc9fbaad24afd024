"""From audio files to shards: sources -> plan -> writer, with a journal that survives kills."""
