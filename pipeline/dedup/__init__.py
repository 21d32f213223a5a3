"""Equal and nearly equal images of all shards."""
