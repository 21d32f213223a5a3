"""The captioner's decoding: cached equals recomputed, whatever the batch."""

from collections import Counter

import pytest
import torch
from small_data import tiny_coca

from pipeline.coca import Decoding, _choose, generate
from shards_spec.files import UserError
from shards_spec.models import load_model

KEYS = [f"{i:09d}" for i in range(12)]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_model(tiny_coca(tmp_path_factory.mktemp("coca")))


@pytest.fixture(scope="module")
def images():
    return torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def ends(loaded, images):
    """Start id, and an end id that random weights really produce at different lengths."""
    start = loaded.tokenizer.sot_token_id
    long = generate(
        loaded.model, images, KEYS, Decoding("greedy", 1, min_tokens=0), start, loaded.tokenizer.eot_token_id
    )
    later = Counter(token for row in long for token in row[0].tokens[3:])
    return start, later.most_common(1)[0][0]


@torch.no_grad()
def recomputed(model, image, start, end, max_tokens, min_tokens):
    """Greedy decoding that feeds the whole prefix through open_clip's own forward at every token."""
    tokens, logprob = [start], 0.0
    while len(tokens) <= max_tokens:
        logits = model(image[None], torch.tensor([tokens]), output_labels=False)["logits"][0, -1]
        allowed = logits.clone()
        if len(tokens) <= min_tokens:
            allowed[end] = -torch.inf
        tokens.append(int(allowed.argmax()))
        logprob += float(logits.log_softmax(-1)[tokens[-1]])
        if tokens[-1] == end:
            return tokens[1:-1], logprob
    return tokens[1:], logprob


@pytest.mark.parametrize("batch", [1, 5, 12])
def test_greedy_equals_full_recomputation(loaded, images, ends, batch):
    start, end = ends
    lengths = set()
    for first in range(0, 12, batch):
        part = images[first : first + batch]
        found = generate(
            loaded.model, part, KEYS[first : first + batch], Decoding("greedy", 1, min_tokens=2), start, end
        )
        for image, (caption,) in zip(part, found, strict=True):
            tokens, logprob = recomputed(loaded.model, image, start, end, 15, 2)
            assert caption.tokens == tokens
            assert abs(caption.logprob - logprob) < 1e-4
            lengths.add(len(tokens))
    assert len(lengths) > 1, "mixed lengths, or finished rows are not tested"


def test_padding_ids_inside_a_caption_are_masked_as_open_clip_masks_them(loaded, images):
    """Id 0 is padding; feed it on purpose and compare the next logits."""
    from pipeline.coca import Decoder

    prefix = [loaded.tokenizer.sot_token_id, 300, 0, 301, 0, 302]
    with torch.no_grad():
        decoder = Decoder(loaded.model, images[:2], 1, 10)
        for token in prefix:
            logits = decoder.step(torch.tensor([token, token]))
        full = loaded.model(images[:2], torch.tensor([prefix] * 2), output_labels=False)["logits"][:, -1]
    assert torch.allclose(logits, full, atol=1e-4)


def test_sampling_does_not_depend_on_the_batch(loaded, images, ends):
    decoding = Decoding(num_captions=3, min_tokens=2, seed=7)
    together = generate(loaded.model, images, KEYS, decoding, *ends)
    shuffled = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    again = generate(loaded.model, images[shuffled], [KEYS[i] for i in shuffled], decoding, *ends)
    alone = [generate(loaded.model, images[i : i + 1], [KEYS[i]], decoding, *ends)[0] for i in range(12)]
    for i in range(12):
        expected = [caption.tokens for caption in together[i]]
        assert [caption.tokens for caption in alone[i]] == expected
        assert [caption.tokens for caption in again[shuffled.tolist().index(i)]] == expected
    assert len({tuple(caption.tokens) for row in together for caption in row}) > 30


def test_seed_and_key_change_the_captions(loaded, images, ends):
    def tokens(keys, seed):
        rows = generate(loaded.model, images, keys, Decoding(num_captions=1, seed=seed), *ends)
        return [row[0].tokens for row in rows]

    base = tokens(KEYS, 0)
    assert tokens(KEYS, 0) == base
    assert sum(a == b for a, b in zip(tokens(KEYS, 1), base, strict=True)) < 4
    assert sum(a == b for a, b in zip(tokens([k + "x" for k in KEYS], 0), base, strict=True)) < 4


def test_nucleus_keeps_the_smallest_set_and_follows_the_probabilities():
    probabilities = torch.tensor([0.1, 0.5, 0.05, 0.3, 0.05])
    logits = probabilities.log().repeat(20_000, 1)
    uniforms = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    chosen = _choose(logits, Decoding(top_p=0.85), uniforms, None)
    share = torch.bincount(chosen, minlength=5) / 20_000
    assert share[[2, 4]].sum() == 0
    assert torch.allclose(share[[1, 3, 0]], torch.tensor([5, 3, 1]) / 9, atol=1e-3)
    assert set(_choose(logits, Decoding(top_p=0.85), uniforms, banned=1).tolist()) == {0, 3, 2}
    assert set(_choose(logits, Decoding(top_p=1e-9), uniforms, None).tolist()) == {1}
    assert _choose(logits[:1], Decoding("greedy", 1), uniforms[:1], None).tolist() == [1]


def test_bad_settings_and_models_are_refused(images):
    import open_clip

    with pytest.raises(UserError, match="top_p"):
        Decoding(top_p=0)
    with pytest.raises(UserError, match="min_tokens 30 must be below max_tokens 30"):
        Decoding(min_tokens=30)
    with pytest.raises(UserError, match="greedy gives the same one"):
        Decoding("greedy", 2)
    plain = open_clip.model.CustomTextCLIP(
        8,
        {"image_size": 32, "layers": 1, "width": 8, "head_width": 8, "patch_size": 16},
        {"width": 8, "heads": 1, "layers": 1},
    )
    with pytest.raises(UserError, match="no text decoder"):
        generate(plain, images, KEYS, Decoding(), 1, 2)


def test_weights_that_are_not_finite_are_named(loaded, images, ends):
    import copy

    broken = copy.deepcopy(loaded.model)
    with torch.no_grad():
        broken.text_decoder.text_projection.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        generate(broken, images, KEYS, Decoding(), *ends)
