"""Teacher embeddings of views and captions."""
