"""Synthetic captions by CoCa."""
