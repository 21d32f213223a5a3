"""Sources of every form into raw shards."""
