"""Samples and labelled images by position, batches of them, teacher caches, and copies of remote files."""
