"""Samples to patches: Kaldi's log-mel on the CPU and in DALI, with the augmentation of both."""
