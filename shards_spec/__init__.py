"""The contract between the floors: samples, shards, manifest, vocabulary, embeddings, views. See SPEC.md."""

import os

SPEC_VERSION = 1
# OpenMP's threads spin while they wait for each other. Where other processes want the same cores, one that spins keeps
# off the one that it waits for: a training of two threads beside four busy processes took 6 to 14 times as long. Read
# when torch is loaded, so it is set by the package that everything here imports first; the user's own value counts.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
