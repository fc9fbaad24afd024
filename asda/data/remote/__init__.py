"""Reads files from local folders and from the network through a bounded cache. Training can be changed without it."""
