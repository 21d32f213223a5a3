"""`clipmill takedown`: samples that have to go, with their images, captions and embeddings."""
