"""The contract between the floors: samples, shards, manifest, vocabulary, embeddings, views. See SPEC.md."""

SPEC_VERSION = 1
