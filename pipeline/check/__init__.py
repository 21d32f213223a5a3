"""Validation of a dataset: files, hashes, keys and totals."""
