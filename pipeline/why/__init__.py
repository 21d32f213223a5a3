"""`clipmill why`: the life of one sample."""
