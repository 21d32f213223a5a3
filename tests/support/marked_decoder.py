"""A decoder that tells others when it is up and working; few imports, for each decoder process has them."""

import os
from pathlib import Path

from pipeline.ingest.images import to_outcome

MARKS = "CLIPMILL_TEST_MARKS"  # folder in which a decoder that has decoded something leaves its process id
MARKING = (
    "import pipeline.ingest.downloader, marked_decoder\n"
    "pipeline.ingest.downloader.to_outcome = marked_decoder.marked_outcome\n"
)


def marked_outcome(data: bytes, rules):
    """`to_outcome`, then the mark."""
    outcome = to_outcome(data, rules)
    Path(os.environ[MARKS], str(os.getpid())).touch()
    return outcome
