"""Shards that lie elsewhere: fetched, verified, kept in a cache of bounded size."""
