"""The surroundings of the training loop: log, throughput, signals, validation, resuming.

The loop can be changed without opening it.
"""
