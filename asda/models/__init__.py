"""The networks: differential attention, the encoder, masked students and their teacher, the classifier, the masks."""
