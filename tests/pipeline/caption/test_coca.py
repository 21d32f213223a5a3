"""Caption decoding: what is kept equals what is recomputed, for every kind of open_clip's CoCa."""

import copy
import json
import math
import os
import platform
import subprocess
import sys
from collections import Counter
from itertools import chain, product
from pathlib import Path

import pytest
import torch
from conftest import skip_or_fail
from small_data import narrow_coca, tiny_coca

from pipeline.caption.beam_search import beam_search
from pipeline.caption.coca import Coca, DecoderState
from pipeline.caption.decoding import Decoding
from pipeline.caption.prepacked_linear import OPERATIONS, can_prepack, prepack_linear
from pipeline.caption.sampling import generate, likeliest, process_logits, sample_token
from shards_spec.files import UserError
from shards_spec.models import load_model

pytestmark = pytest.mark.integration

MODELS = ["coca_ViT-B-32", "coca_ViT-L-14", "coca_base", "coca_roberta-ViT-B-32", "tiny"]
GREEDY = Decoding("greedy", min_tokens=2, max_tokens=14)
IMAGES = 64


def load(name: str, folder: Path) -> Coca:
    model = tiny_coca(folder) if name == "tiny" else narrow_coca(folder, name)
    loaded = load_model(model)
    coca = Coca(loaded.model, loaded.tokenizer)
    coca.end = frequent(coca)
    return coca


def noise(coca: Coca, count: int = IMAGES) -> torch.Tensor:
    size = coca.model.visual.image_size
    size = size if isinstance(size, tuple) else (size, size)
    return 2 * torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(0))


def greedy(coca: Coca, images: torch.Tensor, decoding: Decoding = GREEDY):
    return generate(coca, coca.encode_images(images), range(len(images)), [""] * len(images), decoding)


def frequent(coca: Coca) -> int:
    """An end token that random weights really write, at different places."""
    seen = Counter(chain.from_iterable(caption.tokens[3:] for caption in greedy(coca, noise(coca))))
    return next(token for token, _ in seen.most_common() if token not in coca.suppressed_tokens)


@pytest.fixture(scope="module", params=MODELS)
def coca(request, tmp_path_factory):
    if "roberta" in request.param:
        pytest.importorskip("transformers")
    return load(request.param, tmp_path_factory.mktemp("coca"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return load("tiny", tmp_path_factory.mktemp("tiny"))


@torch.no_grad()
def open_clip_logits(coca: Coca, image: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """(T, V) by open_clip's own forward over the whole text."""
    image = image[None].to(coca.dtype)
    return coca.model(image, torch.tensor([tokens]), output_labels=False)["logits"][0].float()


def recomputed(coca: Coca, image: torch.Tensor, decoding: Decoding = GREEDY) -> list[int]:
    """Greedy decoding that feeds the whole prefix through open_clip's forward at every token."""
    prompt = coca.prompt_tokens(decoding.prefix) if decoding.prefix else []
    tokens = [coca.start, *prompt]
    for position in range(decoding.max_tokens):
        logits = open_clip_logits(coca, image, tokens)[-1:]
        before = torch.tensor([tokens[1:]], dtype=torch.long)
        tokens.append(int(process_logits(logits, before, coca, decoding, position).argmax()))
        if tokens[-1] == coca.end:
            break
    written = tokens[1 + len(prompt) :]
    return written[:-1] if written[-1] == coca.end else written


def scored(coca: Coca, image: torch.Tensor, tokens: list[int], ended: bool, prompt: list[int]) -> float:
    """Teacher-forced log-probability of a caption and its end token.

    RoBERTa sees later tokens from earlier places, so there each token is scored after its own prefix alone.
    """
    text = [coca.start, *prompt, *tokens, *([coca.end] if ended else [])]
    whole = open_clip_logits(coca, image, text) if coca.text_blocks else None
    total = 0.0
    for place in range(1 + len(prompt), len(text)):
        logits = open_clip_logits(coca, image, text[:place])[-1] if whole is None else whole[place - 1]
        total += float(logits.log_softmax(-1)[text[place]])
    return total


def alike(found: float, expected: float) -> bool:
    """Whether two log-probabilities of float32 differ by its rounding alone.

    They are sums over tokens of logits that are sums of hundreds of products, in an order that differs between the two
    ways and between processors: 3.5e-6 of the sum is the largest difference seen on two. A wrong token costs more.
    """
    return abs(found - expected) <= 1e-4 * max(1, abs(expected))


@pytest.fixture(scope="module")
def expected(coca):
    return [recomputed(coca, image) for image in noise(coca)]


@pytest.mark.parametrize("batch", [1, 3, 8, 64])
def test_greedy_equals_full_recomputation(coca, expected, batch):
    images = noise(coca)
    found = list(chain.from_iterable(greedy(coca, images[first : first + batch]) for first in range(0, IMAGES, batch)))
    assert [caption.tokens for caption in found] == expected
    assert len({len(tokens) for tokens in expected}) > 2, "mixed lengths, or rows that leave the batch are not tested"
    if batch == 8:
        for image, caption in zip(images[:16], found, strict=False):
            assert alike(caption.logprob, scored(coca, image, caption.tokens, caption.ended, []))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sampled_captions_of_one_image_have_the_log_probability_of_teacher_forcing(coca, dtype):
    """In float64 exactly, but for the logits, which are float32 in the end: 12 tokens of 1e-6 at most."""
    if dtype == torch.float64:
        end, coca = coca.end, Coca(copy.deepcopy(coca.model).double(), coca.tokenizer)
        coca.end = end
    images, decoding = noise(coca, 6), Decoding(top_p=0.95, temperature=1.5, min_tokens=1, max_tokens=12)
    owners = sorted([*range(6)] * 4)
    found = generate(coca, coca.encode_images(images), owners, [f"{row}" for row in range(24)], decoding)
    for owner, caption in zip(owners, found, strict=True):
        score = scored(coca, images[owner], caption.tokens, caption.ended, [])
        assert alike(caption.logprob, score) if dtype == torch.float32 else abs(caption.logprob - score) < 2e-5
    assert len({tuple(caption.tokens) for caption in found}) > 12
    assert len({len(caption.tokens) for caption in found}) > 2


def slow_beams(coca: Coca, image: torch.Tensor, decoding: Decoding, count: int) -> list[tuple[list[int], float]]:
    """Beam search with open_clip's forward for every hypothesis at every token, to the last token, no stopping."""
    open_ones, finished = [([], 0.0)], []
    for position in range(decoding.max_tokens):
        grown = []
        for tokens, total in open_ones:
            gained = open_clip_logits(coca, image, [coca.start, *tokens])[-1].log_softmax(-1)
            gained[coca.suppressed_tokens] = -torch.inf
            if position < decoding.min_tokens:
                gained[coca.end] = -torch.inf
            best = gained.topk(2 * decoding.num_beams)
            grown += [
                ([*tokens, token], total + value)
                for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]
        grown.sort(key=lambda pair: -pair[1])
        last = position == decoding.max_tokens - 1
        for tokens, total in grown[: decoding.num_beams]:
            if tokens[-1] == coca.end or last:
                finished.append((tokens, total, total / len(tokens) ** decoding.length_penalty))
        open_ones = [pair for pair in grown if pair[0][-1] != coca.end][: decoding.num_beams]
    finished.sort(key=lambda triple: -triple[2])
    return [([t for t in tokens if t != coca.end], total) for tokens, total, _ in finished[:count]]


@pytest.mark.parametrize(("beams", "penalty"), [(1, 1.0), (3, 1.0), (4, 0.0), (4, 2.0), (3, -1.0)])
def test_beam_equals_a_slow_beam_search(coca, beams, penalty):
    decoding = Decoding("beam", num_beams=beams, length_penalty=penalty, min_tokens=2, max_tokens=8)
    images = noise(coca, 6)
    found = beam_search(coca, coca.encode_images(images), beams, decoding)
    for image, captions in zip(images, found, strict=True):
        slow = slow_beams(coca, image, decoding, beams)
        assert [caption.tokens for caption in captions] == [tokens for tokens, _ in slow]
        for caption, (_, total) in zip(captions, slow, strict=True):
            assert alike(caption.logprob, total)
            assert alike(caption.logprob, scored(coca, image, caption.tokens, caption.ended, []))


def test_a_beam_is_at_least_as_likely_as_greedy(tiny):
    images = noise(tiny, 24)
    beams = beam_search(
        tiny,
        tiny.encode_images(images),
        1,
        Decoding("beam", num_beams=8, length_penalty=0, min_tokens=2, max_tokens=14),
    )
    likelier = [
        b.logprob >= g.logprob or alike(b.logprob, g.logprob)
        for (b,), g in zip(beams, greedy(tiny, images), strict=True)
    ]
    assert sum(likelier) >= 22  # beam search may lose the greedy path, seldom


@pytest.mark.parametrize("method", ["greedy", "beam"])
def test_a_prefix_is_fed_once_and_not_scored(coca, method):
    decoding = Decoding(method, num_beams=2, min_tokens=2, max_tokens=8, prefix="a red ball")
    images, prompt = noise(coca, 5), coca.prompt_tokens("a red ball")
    assert coca.decode(prompt) == "a red ball"
    if method == "greedy":
        found = greedy(coca, images, decoding)
        assert [caption.tokens for caption in found] == [recomputed(coca, image, decoding) for image in images]
    else:
        found = [captions[0] for captions in beam_search(coca, coca.encode_images(images), 1, decoding)]
    for image, caption in zip(images, found, strict=True):
        assert alike(caption.logprob, scored(coca, image, caption.tokens, caption.ended, prompt))


class WithoutOperations:
    """torch.ops.mkldnn of a build that lacks the operations."""


@pytest.mark.parametrize("absent", OPERATIONS)
def test_without_onednns_private_operations_the_captions_are_the_same(tiny, monkeypatch, absent):
    images = noise(tiny, 8)
    decoding = Decoding("beam", num_beams=3, min_tokens=2, max_tokens=8)
    expected = greedy(tiny, images), beam_search(tiny, tiny.encode_images(images), 2, decoding)
    there = WithoutOperations()
    for name in OPERATIONS:
        if name != absent:
            setattr(there, name, getattr(torch.ops.mkldnn, name))
    monkeypatch.setattr(torch.ops, "mkldnn", there)
    assert not can_prepack(torch.ones(4, 4))
    linear = prepack_linear(torch.full((2, 3), 2.0), torch.ones(2))
    assert linear(torch.ones(5, 3)).tolist() == [[7.0, 7.0]] * 5
    plain = Coca(tiny.model, tiny.tokenizer)
    plain.end = tiny.end
    found = greedy(plain, images), beam_search(plain, plain.encode_images(images), 2, decoding)
    assert [caption.tokens for caption in found[0]] == [caption.tokens for caption in expected[0]]
    assert [[c.tokens for c in captions] for captions in found[1]] == [
        [c.tokens for c in captions] for captions in expected[1]
    ]


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="prepacking is for x86 CPUs")
def test_this_torch_has_the_operations_and_they_equal_a_plain_product():
    assert all(hasattr(torch.ops.mkldnn, name) for name in OPERATIONS)
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(*shape, generator=generator) for shape in ((48, 32), (48,), (5, 32)))
    assert can_prepack(weight)
    assert not can_prepack(weight.double())
    torch.testing.assert_close(prepack_linear(weight, bias)(x), torch.nn.functional.linear(x, weight, bias))


def test_a_prefix_that_leaves_no_room_is_named(tiny):
    with pytest.raises(UserError, match=r"16 places.*prefix of 12 tokens.*--min-tokens 5"):
        greedy(tiny, noise(tiny, 1), Decoding("greedy", prefix=" ".join(["a"] * 12)))
    with pytest.raises(UserError, match="prefix 'a a"):
        tiny.prompt_tokens(" ".join(["a"] * 15))


def test_repetition_penalty(tiny):
    scores = torch.tensor([[2.0, -1.0, 0.5, 3.0]]).repeat(1, 600)[:, : tiny.decoder.text_projection.shape[1]]
    changed = process_logits(scores, torch.tensor([[100, 101, 101]]), tiny, Decoding(repetition_penalty=2.0), 9)
    assert changed[0, 100] == 1.0
    assert changed[0, 101] == -2.0
    rest = [place for place in range(4, scores.shape[1]) if place not in (100, 101, *tiny.suppressed_tokens)]
    assert torch.equal(changed[0, rest], scores[0, rest])
    decoding = Decoding("greedy", repetition_penalty=1.3, min_tokens=2, max_tokens=14)
    images = noise(tiny, 8)
    found = [caption.tokens for caption in greedy(tiny, images, decoding)]
    assert found == [recomputed(tiny, image, decoding) for image in images]
    assert found != [caption.tokens for caption in greedy(tiny, images)]


def test_lengths_are_kept(coca):
    for least, most in ((0, 3), (6, 7), (9, 12)):
        for caption in greedy(coca, noise(coca, 12), Decoding("greedy", min_tokens=least, max_tokens=most)):
            assert least <= len(caption.tokens) <= most
            assert caption.ended == (len(caption.tokens) < most)


def test_sampling_does_not_depend_on_the_batch(coca):
    images, decoding = noise(coca, 12), Decoding(min_tokens=2, max_tokens=14)

    def captions(order: list[int]) -> dict[tuple[int, int], list[int]]:
        owners = sorted([*range(len(order))] * 3)
        names = [f"{image}/{n}" for image, n in product(order, range(3))]
        found = generate(coca, coca.encode_images(images[order]), owners, names, decoding)
        return {
            (order[owner], row % 3): caption.tokens
            for row, (owner, caption) in enumerate(zip(owners, found, strict=True))
        }

    together = captions(list(range(12)))
    assert captions(list(reversed(range(12)))) == together
    alone = {}
    for image in range(12):
        alone |= captions([image])
    assert alone == together
    one = generate(coca, coca.encode_images(images[3:4]), [0], ["3/2"], decoding)[0]
    assert one.tokens == together[3, 2]


def test_sampling_keeps_the_smallest_set_and_follows_the_probabilities():
    count, probabilities = 400_000, torch.tensor([0.1, 0.5, 0.05, 0.3, 0.05])
    logits, seeds = probabilities.log().repeat(count, 1), torch.arange(count) * 7919

    def share(decoding: Decoding) -> torch.Tensor:
        return torch.bincount(sample_token(logits, decoding, seeds), minlength=5) / count

    def near(found: torch.Tensor, expected: torch.Tensor) -> bool:
        expected = expected.float() / expected.sum()
        return bool(((found - expected).abs() <= 4 * (expected * (1 - expected) / count).sqrt()).all())

    assert near(share(Decoding(top_p=0.85)), torch.tensor([1, 5, 0, 3, 0]))
    assert near(share(Decoding(top_p=0.85, temperature=0.5)), torch.tensor([0, 25, 0, 9, 0]))
    assert near(share(Decoding(top_p=1e-9)), torch.tensor([0, 1, 0, 0, 0]))
    assert near(share(Decoding(top_p=1.0)), probabilities)
    assert near(share(Decoding("top_k", top_k=2)), torch.tensor([0, 5, 0, 3, 0]))
    assert near(share(Decoding("top_k", top_k=4)), probabilities)  # the fifth is as likely as the fourth
    assert near(share(Decoding(top_p=1.0, temperature=0.5)), probabilities**2)
    assert sample_token(logits[:1], Decoding("greedy"), seeds[:1]).tolist() == [1]


def slow_gumbel(seed: int, token: int) -> float:
    """SplitMix64 with Python's numbers."""
    mask = 2**64 - 1
    x = (seed + token * 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    x ^= x >> 31
    return -math.log(-math.log(((x >> 11) + 0.5) / 2**53))


def slowly_chosen(logits: torch.Tensor, decoding: Decoding, seed: int) -> int:
    """One row, by a plain sort of the whole vocabulary."""
    scores = (logits / decoding.temperature).tolist()
    order = sorted(range(len(scores)), key=lambda token: -scores[token])
    if decoding.method == "top_k":
        kept = [token for token in order if scores[token] >= scores[order[decoding.top_k - 1]]]
    else:
        probabilities = torch.tensor(scores).softmax(-1).tolist()
        mass = 0.0
        kept = []
        for token in order:
            if mass >= decoding.top_p and scores[token] < scores[kept[-1]]:
                break
            kept.append(token)
            mass += probabilities[token]
    return max(kept, key=lambda token: scores[token] + slow_gumbel(seed, token))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
def test_choosing_equals_a_full_sort_whatever_the_size_of_the_set(spread, precision):
    """Flat rows need more than the first 128 tokens; bfloat16 has many equal ones."""
    logits = (spread * torch.randn(24, 5000, generator=torch.Generator().manual_seed(1))).to(precision).float()
    seeds = torch.randint(-(2**62), 2**62, (24,), generator=torch.Generator().manual_seed(2))
    for decoding in (Decoding(top_p=0.9), Decoding(top_p=0.3), Decoding("top_k", top_k=150, temperature=0.7)):
        found = sample_token(logits, decoding, seeds).tolist()
        assert found == [slowly_chosen(row, decoding, seed) for row, seed in zip(logits, seeds.tolist(), strict=True)]


@pytest.mark.parametrize(("vocabulary", "size"), [(49408, 128), (49408, 2048), (4096, 16), (1001, 16), (64, 64)])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_likeliest_tokens_are_those_of_a_full_sort(vocabulary, size, precision):
    """With infinities, as forbidden tokens have, and in bfloat16 with many equal values."""
    scores = torch.randn(5, vocabulary, generator=torch.Generator().manual_seed(0)).to(precision).float()
    scores[0, : vocabulary // 2] = -torch.inf
    scores[1] = scores[1].sort().values
    values, ids = likeliest(scores, size)
    assert torch.equal(values, scores.sort(-1, descending=True).values[:, :size])
    assert torch.equal(scores.gather(1, ids), values)
    assert all(len(set(row)) == size for row in ids.tolist())


def test_text_features_are_those_of_encode_text(coca):
    texts = ["a red ball on a wall", "a", "", "two blue boxes and a green cross " * 9]
    with torch.no_grad():
        full = coca.model.encode_text(coca.tokenizer(texts), normalize=True)
    assert torch.allclose(coca.text_features(texts), full, atol=1e-5)
    assert torch.allclose(coca.text_features(texts[:2]), full[:2], atol=1e-5)


def test_half_precision_writes_much_the_same(tiny, tmp_path):
    loaded = load_model(tiny_coca(tmp_path), precision="bf16")
    half = Coca(loaded.model, loaded.tokenizer)
    half.end = tiny.end
    images = noise(tiny, 16)
    found, full = greedy(half, images), greedy(tiny, images)
    assert sum(a.tokens[:3] == b.tokens[:3] for a, b in zip(found, full, strict=True)) >= 12
    beam_search(half, half.encode_images(images), 2, Decoding("beam", num_beams=2, max_tokens=8))


LENGTHS = [(15, 4), (8, 2), (8, 6), (5, 3)]  # open_clip's seq_len and min_seq_len, as Decoding's help translates them


def test_equal_to_open_clips_own_generate(tmp_path):
    """In a process with the transformers release that open_clip's generate still runs with."""
    old = Path(sys.prefix) / "transformers-4.46"
    if not old.exists():
        skip_or_fail(f"no transformers 4.46 in {old}: `make test` installs it")
    loaded = load_model(tiny_coca(tmp_path / "coca"))
    coca = Coca(loaded.model, loaded.tokenizer)
    images = noise(coca, 32)
    coca.end = frequent(coca)
    torch.save({"images": images, "start": coca.start, "end": coca.end}, tmp_path / "in.pt")
    code = f"""
import json, open_clip, torch
given = torch.load({str(tmp_path / "in.pt")!r})
model = open_clip.create_model("local-dir:{tmp_path / "coca"}").eval()
def generate(most, least):
    return model.generate(given["images"], generation_type="top_k", top_k=1, seq_len=most, min_seq_len=least,
                          sot_token_id=given["start"], eos_token_id=given["end"]).tolist()
print(json.dumps([generate(*lengths) for lengths in {LENGTHS}]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(old)}
    )
    assert done.returncode == 0, done.stderr
    cut = 0
    for (most, least), rows in zip(LENGTHS, json.loads(done.stdout.splitlines()[-1]), strict=True):
        found = greedy(coca, images, Decoding("greedy", min_tokens=least - 1, max_tokens=most - 2))
        compared = 0
        for caption, row in zip(found, rows, strict=True):
            if set(row[1 : 1 + len(caption.tokens)]) & set(coca.suppressed_tokens):
                continue  # open_clip may write padding, and takes it for the end
            compared, cut = compared + 1, cut + (not caption.ended)
            assert row[: len(caption.tokens) + 2] == [coca.start, *caption.tokens, coca.end]
        assert compared > 20
    assert cut, "no caption was as long as it may be"


def test_weights_that_are_not_finite_are_named(tiny):
    broken = copy.deepcopy(tiny.model)
    with torch.no_grad():
        broken.text_decoder.text_projection.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        greedy(Coca(broken, tiny.tokenizer), noise(tiny, 2))


def test_bad_settings_and_models_are_refused(tiny):
    import open_clip

    for settings, message in (
        ({"top_p": 0}, r"--top-p 0: must be in \(0, 1\]"),
        ({"min_tokens": 30}, "--min-tokens 30: must be 0 or more, below --max-tokens 30"),
        ({"temperature": 0}, "--method greedy"),
        ({"top_k": 0}, "--top-k 0"),
        ({"num_beams": 0}, "--num-beams 0"),
        ({"repetition_penalty": 0}, "--repetition-penalty 0"),
        ({"max_tokens": 0, "min_tokens": 0}, "--max-tokens 0"),
    ):
        with pytest.raises(UserError, match=message):
            Decoding(**settings)
    for decoding, number in ((Decoding("greedy"), 2), (Decoding("beam", num_beams=3), 4)):
        with pytest.raises(
            UserError, match=f"--num-captions {number}: must be at most . with --method {decoding.method}"
        ):
            decoding.check_num_captions(number)
    with pytest.raises(UserError, match="--num-captions 0: must be 1 or more"):
        Decoding().check_num_captions(0)
    vision = {"image_size": 32, "layers": 1, "width": 8, "head_width": 8, "patch_size": 16}
    plain = open_clip.model.CustomTextCLIP(8, vision, {"width": 8, "heads": 1, "layers": 1})
    with pytest.raises(UserError, match="no text decoder"):
        Coca(plain, tiny.tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS[:4])
def test_full_size_models_greedy_and_beam(name, tmp_path):
    """The real widths and depths, random weights: batch of 4, greedy and beam against recomputation."""
    import open_clip

    torch.manual_seed(0)
    config = open_clip.get_model_config(name)
    if "roberta" in name:
        from small_data import write_roberta

        pytest.importorskip("transformers")
        config["text_cfg"] |= write_roberta(tmp_path, width=768, layers=12, heads=12, wide=3072)
        config["multimodal_cfg"]["vocab_size"] = config["text_cfg"]["vocab_size"]
    config.pop("custom_text")
    model = open_clip.CoCa(**config).eval()
    with torch.no_grad():
        for parameter in model.text_decoder.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.1 if parameter.ndim == 2 else 0.02))
    tokenizer = open_clip.tokenizer.SimpleTokenizer()
    if "roberta" in name:
        tokenizer = open_clip.tokenizer.HFTokenizer(str(tmp_path), context_length=76)
    coca = Coca(model, tokenizer)
    images, decoding = noise(coca, 4), Decoding("greedy", min_tokens=2, max_tokens=10)
    written = chain.from_iterable(caption.tokens[2:] for caption in greedy(coca, images, decoding))
    coca.end = Counter(written).most_common(1)[0][0]
    found = greedy(coca, images, decoding)
    assert [caption.tokens for caption in found] == [recomputed(coca, image, decoding) for image in images]
    beam = Decoding("beam", num_beams=3, min_tokens=2, max_tokens=6)
    beams = beam_search(coca, coca.encode_images(images[:2]), 3, beam)
    for image, captions in zip(images, beams, strict=False):
        assert [caption.tokens for caption in captions] == [tokens for tokens, _ in slow_beams(coca, image, beam, 3)]


def test_a_prompt_may_be_fed_at_once_or_token_by_token(coca):
    images = noise(coca, 3)
    prompt = torch.tensor([[coca.start, *coca.prompt_tokens("a blue box")]]).expand(3, -1)
    with torch.inference_mode():
        encoded = coca.encode_images(images)
        at_once = DecoderState.empty(coca, encoded, 12).step(prompt)
        state = DecoderState.empty(coca, encoded, 12)
        one_by_one = [state.step(prompt[:, place : place + 1]) for place in range(prompt.shape[1])][-1]
    assert torch.allclose(at_once, one_by_one, rtol=0, atol=1e-4 * at_once.abs().max().item())  # float32 sums
