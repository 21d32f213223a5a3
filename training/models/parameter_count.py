"""How many parameters a student has: image tower, text tower and token embeddings apart, tied ones once."""

from torch import Tensor, nn

IMAGE = "visual."
TEXT = ("text.", "transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")
MASKS = "masks"  # part of the name of a learned mask, which the student does not keep


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Return ``total``, ``image``, ``text``, ``embedding`` and ``other`` of a model, a number of parameters each.

    A parameter that several modules share counts once, for the first of them. ``embedding`` is the table of tokens,
    which ``text`` is without; ``other`` are the logit scale and a captioner's decoder. A model without a text tower is
    an image tower as a whole. Masks that are still learned do not count.
    """
    is_clip = hasattr(model, "encode_text")
    table = _token_table(model)
    counts = dict.fromkeys(("image", "text", "embedding", "other"), 0)
    for name, parameter in model.named_parameters():
        if MASKS in name.split("."):
            continue
        if parameter is table:
            part = "embedding"
        elif not is_clip or name.startswith(IMAGE):
            part = "image"
        else:
            part = "text" if name.startswith(TEXT) else "other"
        counts[part] += parameter.numel()
    return {"total": sum(counts.values()), **counts}


def _token_table(model: nn.Module) -> Tensor | None:
    """The embeddings of tokens: those of the text tower with the most rows; positions have fewer."""
    named = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    tables = [module.weight for name, module in named if f"{name}.".startswith(TEXT)]
    return max(tables, key=len, default=None)
