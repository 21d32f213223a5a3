"""From image-text lists to reinforced shards: ingest, caption, pack, vocab, cache, check, report."""
