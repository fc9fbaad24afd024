"""A run as data: one tree of sections, checked once, read from one JSON file."""
