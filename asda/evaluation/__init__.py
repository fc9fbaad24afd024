"""Score networks on held-out clips: logits, metrics, probes, reports.

Training can be changed without opening this room, but for its loop.
"""
