"""Checkpoints that are whole or absent: read, verify, write beside the training.

Training changes without opening it.
"""
