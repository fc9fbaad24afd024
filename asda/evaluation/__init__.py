"""Score networks on held-out clips: logits, metrics, probes, reports."""
