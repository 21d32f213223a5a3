"""Raw images, captions and synsets into final shards."""
