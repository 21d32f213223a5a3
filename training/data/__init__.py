"""Samples in order, from shards and teacher caches."""
