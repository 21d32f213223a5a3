"""What an evaluation set is made of, before any image is read."""

from dataclasses import dataclass, field

from pipeline.ingest.rows import ImageRef

PROMPT = "a photo of a {c}."  # the one of CLIP's paper (arXiv 2103.00020, section 3.1.4)


@dataclass(frozen=True, slots=True)
class EvalItem:
    """An image and its answer, or why it is left out.

    Attributes:
        name: Where it is from, for messages.
        answer: The label's number, or captions, one a line.
        ref: Where its bytes lie; None where there is a ``problem``.
        stamp: Changes with the content of the file that ``ref`` lies in.
        problem: A short, stable reason fit for counting.
    """

    name: str
    answer: str = ""
    ref: ImageRef | None = None
    stamp: str = ""
    problem: str | None = None


@dataclass(frozen=True)
class EvalSource:
    """All items of a set, and what holds for all of them.

    Attributes:
        items: The items, in the order in which they are written.
        classes: Names of the classes by label; empty for captions.
        prompts: Prompts with ``{c}`` for the class; empty for captions.
        dropped: Inputs that have no image at all, by reason.
    """

    items: list[EvalItem]
    classes: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
