"""A tagger for `pack --nouns-only --tagger slow_tagger:tag` that takes its time, so that tests can interfere."""

import os
import time


def tag(words: list[str]) -> list[str]:
    """Every word is a noun; CLIPMILL_SLOW_S seconds each caption, five times that in array task CLIPMILL_SLOW_TASK."""
    slow = os.environ.get("SLURM_ARRAY_TASK_ID", "none") == os.environ.get("CLIPMILL_SLOW_TASK")
    time.sleep(float(os.environ.get("CLIPMILL_SLOW_S", "0")) * (5 if slow else 1))
    return ["NN"] * len(words)
