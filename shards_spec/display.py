"""Text that holds words of others, made fit to be shown: it does nothing to a terminal, and tells no secrets.

Names of files, keys, captions and answers may hold escape sequences; addresses may hold passwords and signatures.
"""

import logging
import os
import re

from shards_spec.files import UserError

OURS = ("pipeline", "shards_spec", "slurm", "training", "clipmill", "__main__")

# all but tab and line feed that a terminal obeys, what turns the order of letters, and what is no text at all
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
    """Log from the level that CLIPMILL_LOG names (INFO) to stderr, `shown`; nothing where logging is set up already.

    Of other packages only warnings, but for open_clip's about random weights: where they are not what was asked for,
    loading fails. Raises UserError for a level that is none.
    """
    level = os.environ.get("CLIPMILL_LOG", "INFO").upper()
    if level not in logging.getLevelNamesMapping():
        raise UserError(f"CLIPMILL_LOG={level}: there are {', '.join(logging.getLevelNamesMapping())}")
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter())
    handler.addFilter(_worth_telling)
    logging.basicConfig(level=level, handlers=[handler])


def _worth_telling(record: logging.LogRecord) -> bool:
    if record.name.split(".")[0] in OURS:
        return True
    said = record.getMessage()
    random = "Model initialized randomly" in said or "no CLIP weights found" in said
    return record.levelno >= logging.WARNING and not random
