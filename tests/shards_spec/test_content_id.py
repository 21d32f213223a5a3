"""What a row of a cache was made from."""

import hashlib

from shards_spec.content_id import content_id


def test_what_an_identity_is():
    assert content_id(b"a") == int(hashlib.sha256(b"a").hexdigest()[:16], 16)
