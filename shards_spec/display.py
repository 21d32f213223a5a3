"""Text from outside, made safe to show: without terminal control characters and without secrets.

Names of files, keys, captions and answers may hold escape sequences; addresses may hold passwords and signatures.
"""

import logging
import os
import re

from shards_spec.files import UserError

OURS = ("pipeline", "shards_spec", "slurm", "training", "clipmill", "__main__")

# Control characters except tab and line feed, marks that change the direction of text, and half surrogates.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
ADDRESS = re.compile(r"://[^\s\"'<>]+")
USER = re.compile(r"://[^/?#]*@")
SECRET = re.compile(
    r"([?&;#][^=&;?#]*(?:sig|token|key|secret|pass|pwd|auth|cred|session|policy|jwt|code)[^=&;?#]*=)[^&#]*?"
    r"(?=[:,.;)\]]*(?:[&#]|$))",
    re.IGNORECASE,
)


def shown(text: str) -> str:
    r"""``text`` with control characters as ``\x1b`` is written, and without `hide_secrets`' secrets."""
    return hide_secrets(CONTROL.sub(lambda found: ascii(found[0])[1:-1], text))


def hide_secrets(text: str) -> str:
    """``text`` whose addresses have ``***`` for user and password, and for the values of query keys that sound secret.

    A key does when it holds a word such as sig, token or key: ``X-Amz-Signature``, ``sig``, ``access_token``.
    """
    return ADDRESS.sub(lambda found: SECRET.sub(r"\1***", USER.sub("://***@", found[0])), text)


class LogFormatter(logging.Formatter):
    """A level's letter and a message that is `shown`."""

    def __init__(self) -> None:
        super().__init__("%(levelname).1s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """As `logging.Formatter.format`."""
        return shown(super().format(record))


def log_to_stderr() -> None:
    """Log to stderr from the level that CLIPMILL_LOG names (INFO) on; does nothing where logging is set up already.

    Of other packages only warnings are shown, except open_clip's about random weights: where those were not asked for,
    loading fails anyway. Raises UserError for an unknown level.
    """
    level = os.environ.get("CLIPMILL_LOG", "INFO").upper()
    if level not in logging.getLevelNamesMapping():
        raise UserError(f"CLIPMILL_LOG={level}: there are {', '.join(logging.getLevelNamesMapping())}")
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter())
    handler.addFilter(_is_worth_showing)
    logging.basicConfig(level=level, handlers=[handler])


def _is_worth_showing(record: logging.LogRecord) -> bool:
    if record.name.split(".")[0] in OURS:
        return True
    text = record.getMessage()
    is_about_random_weights = "Model initialized randomly" in text or "no CLIP weights found" in text
    return record.levelno >= logging.WARNING and not is_about_random_weights
