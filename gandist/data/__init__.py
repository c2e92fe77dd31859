"""Shards to batches: pack, index, order, read, decode, stream. Data flows one way, and nothing here knows a game."""
