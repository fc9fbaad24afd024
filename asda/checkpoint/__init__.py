"""Checkpoints that are whole or absent: read, verify, and write them while training continues."""
