"""Evaluation sets in CLIP_benchmark's WebDataset layout, made from what the data sets' authors publish."""
