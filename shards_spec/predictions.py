"""What models say of a few images of an evaluation set: `training` computes it, the page of `compare` shows it."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Guess:
    """A class or a caption, and how sure the model is of it: a probability, or for captions a cosine."""

    text: str
    score: float
    is_right: bool


@dataclass(frozen=True)
class GuessedImage:
    """An image as it is stored, what is true of it, and what each model says.

    ``truth`` has the name of its class, or its captions. ``guesses`` maps the name that a model was asked for by (a
    RUN's path) to its best ones, the best first.
    """

    key: str
    image: bytes
    truth: tuple[str, ...]
    guesses: dict[str, tuple[Guess, ...]]


@dataclass(frozen=True)
class Guesses:
    """The images of one evaluation set.

    Attributes:
        dataset: Its name.
        score: What a guess's score is, in words.
        images: The images.
        silent: Models that could not be asked, with the reason, by the name they were asked for by.
    """

    dataset: str
    score: str
    images: list[GuessedImage]
    silent: dict[str, str] = field(default_factory=dict)
