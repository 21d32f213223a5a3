"""Zero-shot classification, retrieval, accuracy."""
