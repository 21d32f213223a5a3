"""Stage `select`: which samples and captions of the final shards are used."""
