"""Score networks on held-out clips: logits, metrics, probes, reports. Training can be changed without opening it,
except loop.py, which every evaluation runs.
"""
