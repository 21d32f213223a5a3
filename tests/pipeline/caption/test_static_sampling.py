"""Captions in static memory are those of the eager path, also when their work is a recording that is played again."""

import logging
from collections.abc import Callable

import numpy as np
import pytest
import torch
from small_data import narrow_coca, tiny_coca
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from pipeline.caption import static_buffers, static_sampling
from pipeline.caption.coca import Coca
from pipeline.caption.cuda_graphs import GraphCache
from pipeline.caption.decoding import Decoding
from pipeline.caption.sampling import DecodedTokens, generate, sample_token
from pipeline.caption.static_buffers import Layout, size_for
from pipeline.caption.static_sampling import StaticSampler
from shards_spec.files import UserError
from shards_spec.models import load_model

pytestmark = pytest.mark.integration

SETTINGS = {
    "greedy": Decoding("greedy", min_tokens=2, max_tokens=12),
    "top_k": Decoding("top_k", top_k=20, min_tokens=1, max_tokens=12),
    "nucleus": Decoding("nucleus", top_p=0.8, temperature=0.7, min_tokens=0, max_tokens=12),
    "penalty": Decoding("nucleus", repetition_penalty=1.3, min_tokens=3, max_tokens=12),
    "prefix": Decoding("top_k", top_k=5, min_tokens=2, max_tokens=9, prefix="a red ball", repetition_penalty=1.2),
}
WAITS = ("_local_scalar_dense", "nonzero", "_unique2", "bincount", "lift_fresh", "is_nonzero", "equal")


class Recording(TorchDispatchMode):
    """What a CUDA graph is, on the CPU: operations with the very tensors of their first run, done again by `play`.

    Results of a replay go to the memory of the recorded results; views are not made again. Capturing does nothing: what
    changed is restored. An operation that waits for a GPU's value is refused, as a capture refuses it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple] = []
        self.changed: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._overloadpacket.__name__
        if name in WAITS:
            raise RuntimeError(f"{name} waits for the device")
        kwargs = kwargs or {}
        given = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
        given = [tensor for tensor in given if not tensor.is_mkldnn]  # oneDNN's weights have no storage to look at
        if function._schema.is_mutable:
            self.changed += [(tensor, tensor.clone()) for tensor in given if 0 not in tensor.stride()]
        results = function(*args, **kwargs)
        mine = {tensor.untyped_storage().data_ptr() for tensor in given}
        made = [value for value in tree_flatten(results)[0] if isinstance(value, torch.Tensor)]
        is_view = not function._schema.is_mutable and any(t.untyped_storage().data_ptr() in mine for t in made)
        if not is_view:
            self.operations.append((function, args, kwargs, made))
        return results

    def restore(self) -> None:
        for tensor, before in reversed(self.changed):
            tensor.copy_(before)

    def play(self) -> None:
        for function, args, kwargs, made in self.operations:
            results = function(*args, **kwargs)
            for old, new in zip(made, tree_flatten(results)[0], strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def record(work: Callable[[], None]) -> Callable[[], None]:
    recording = Recording()
    with recording:
        work()
    recording.restore()
    return recording.play


@pytest.fixture(scope="module", params=["tiny", "coca_ViT-L-14"])
def coca(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("coca")
    model = tiny_coca(folder) if request.param == "tiny" else narrow_coca(folder, request.param)
    loaded = load_model(model)
    return Coca(loaded.model, loaded.tokenizer)


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    monkeypatch.setattr(static_buffers, "SMALLEST", 2)


def noise(coca: Coca, count: int) -> torch.Tensor:
    size = coca.model.visual.image_size
    size = size if isinstance(size, tuple) else (size, size)
    return 2 * torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(0))


def frequent(coca: Coca, decoding: Decoding) -> int:
    """An end token that these settings write at different places."""
    written = eager(coca, decoding, [3] * 16)
    first = np.array([(caption.tokens + [-1] * 12)[:12] for caption in written])
    tokens, counts = np.unique(first[:, decoding.min_tokens + 1 :], return_counts=True)
    order = [int(token) for token in tokens[counts.argsort()[::-1]]]
    return next(token for token in order if token not in (*coca.suppressed_tokens, -1))


def job(coca: Coca, captions: list[int], first: int = 0) -> tuple:
    """Encoded images, owners and names for ``captions[i]`` captions of image i."""
    owners = np.repeat(np.arange(len(captions)), captions).tolist()
    names = [f"{first + image}/{row - owners.index(image)}" for row, image in enumerate(owners)]
    return coca.encode_images(noise(coca, first + len(captions))[first:]), owners, names


def eager(coca: Coca, decoding: Decoding, captions: list[int], first: int = 0) -> list[DecodedTokens]:
    images, owners, names = job(coca, captions, first)
    return generate(coca, images, owners, names, decoding)


def check_alike(found: list[DecodedTokens], expected: list[DecodedTokens]) -> None:
    """The same tokens; log-probabilities that differ by the order of float32 sums."""
    assert [(caption.tokens, caption.ended) for caption in found] == [(c.tokens, c.ended) for c in expected]
    assert [caption.logprob for caption in found] == pytest.approx([c.logprob for c in expected], rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("new_capture", [None, lambda: record], ids=["direct", "recorded"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_captions_are_those_of_the_eager_path(coca, setting, new_capture, monkeypatch):
    """Batches of every size follow each other in the same memory, and rows leave them."""
    decoding = SETTINGS[setting]
    monkeypatch.setattr(coca, "end", frequent(coca, decoding))
    sampler = StaticSampler(coca, decoding, GraphCache(new_capture))
    many = 1 if setting == "greedy" else 3
    jobs = [([many] * 16, 0), ([many] * 16, 4), ([many] * 16, 0), ([many] * 5, 7), ([1] * 9, 3), ([1], 2)]
    if many > 1:
        jobs += [([3, 1, 2, 1, 3, 3, 2], 1), ([2] * 16, 5), ([3, 1, 2, 1, 3, 3, 2], 6)]
    lengths = set()
    for captions, first in jobs:
        expected = eager(coca, decoding, captions, first)
        images, owners, names = job(coca, captions, first)
        check_alike(sampler.generate(images, owners, names), expected)
        lengths |= {len(caption.tokens) for caption in expected}
    assert len(lengths) > 2, "captions of one length never leave the batch"
    assert bool(len(sampler.graphs)) == (new_capture is not None)


def test_a_new_sampler_captures_what_comes_again(coca):
    sampler = StaticSampler(coca, SETTINGS["top_k"], GraphCache(lambda: record))
    images, owners, names = job(coca, [2] * 8)
    for captured in (0, sampler.longest, sampler.longest):
        sampler.generate(images, owners, names)
        assert len(sampler.graphs) == captured
    larger, owners, names = job(coca, [2] * 9)
    sampler.generate(larger, owners, names)
    assert len(sampler.graphs) == 0, "the memory that these graphs wrote to is gone"


@pytest.mark.parametrize("method", ["top_k", "nucleus"])
def test_captions_that_need_more_candidates_are_written_again(coca, method):
    """Flat probabilities: later batches look at more."""
    decoding = Decoding(method, top_p=0.95, top_k=3, temperature=8.0, min_tokens=0, max_tokens=6)
    sampler = StaticSampler(coca, decoding, GraphCache(lambda: record))
    sampler.candidates = 3
    images, owners, names = job(coca, [2] * 6)
    expected = generate(coca, images, owners, names, decoding)
    seen = []
    for _ in range(3):
        seen.append(sampler.candidates)
        check_alike(sampler.generate(images, owners, names), expected)
    assert seen == [3, 48, 48 if method == "top_k" else 768]


def test_a_kernel_for_large_nuclei_spares_writing_again(coca, monkeypatch):
    decoding = Decoding(top_p=0.95, temperature=8.0, min_tokens=0, max_tokens=6)
    images, owners, names = job(coca, [2] * 6)
    expected = generate(coca, images, owners, names, decoding)
    asked = []

    def sample_incomplete(scores, seeds, top_p, chosen, complete):
        asked.append(complete.clone())
        chosen.copy_(torch.where(complete, chosen, sample_token(scores, Decoding(top_p=top_p), seeds)))

    monkeypatch.setattr(static_sampling, "nucleus_kernel", lambda device: sample_incomplete)
    sampler = StaticSampler(coca, decoding, GraphCache(None))
    sampler.candidates = 3
    monkeypatch.setattr(static_sampling, "generate", None)
    check_alike(sampler.generate(images, owners, names), expected)
    assert sampler.candidates == 3
    assert len(asked) == sampler.longest
    assert not all(complete.all() for complete in asked)


def test_where_capturing_fails_captions_are_written_without_it(coca, caplog):
    def refused():
        def capture(work):
            raise RuntimeError("operation not permitted when stream is capturing\nmore about it")

        return capture

    decoding = SETTINGS["nucleus"]
    sampler = StaticSampler(coca, decoding, GraphCache(refused))
    images, owners, names = job(coca, [2] * 4)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            check_alike(sampler.generate(images, owners, names), generate(coca, images, owners, names, decoding))
    assert [record.message for record in caplog.records] == [
        "no CUDA graphs here, so captions take longer: operation not permitted when stream is capturing"
    ]


@pytest.mark.parametrize("hidden", [False, True])
def test_a_lack_of_memory_while_capturing_is_for_the_caller_to_mend(hidden):
    """Ending a capture that failed may raise an error of its own over the one that matters."""

    def capture(work):
        try:
            raise torch.OutOfMemoryError("no more")
        finally:
            if hidden:
                raise RuntimeError("capture was invalidated")

    graphs = GraphCache(lambda: capture)
    done = []
    graphs.run("work", lambda: done.append(1))
    with pytest.raises(torch.OutOfMemoryError):
        graphs.run("work", lambda: done.append(2))
    graphs.clear()
    graphs.run("work", lambda: done.append(3))
    assert done == [1, 3]


def test_a_recording_refuses_to_wait():
    values = torch.ones(3)
    with pytest.raises(RuntimeError, match="waits for the device"), Recording():
        values.sum().item()
    with pytest.raises(RuntimeError, match="waits for the device"), Recording():
        values[[0, 1]] = 2.0


def test_a_caption_without_a_neighbour_has_a_place_of_its_own():
    image, slots = np.array([0, 0, 0, 1, 3, 3]), 3
    layout = Layout.of(image, np.arange(6), capacity=8, slots=slots)
    assert (layout.rows, layout.images, layout.scattered) == (6, 4, True)
    assert layout.grid.tolist() == [0, 1, 2, 3, 9, 10]
    full = Layout.of(np.repeat(np.arange(5), 3), np.arange(15), capacity=8, slots=slots)
    assert (full.rows, full.images, full.scattered) == (24, 8, False)
    assert sorted(full.grid.tolist()) == list(range(24))


def test_sizes_are_halves_of_the_largest():
    found = {count: size_for(count, 100) for count in (100, 51, 50, 26, 25, 13, 7, 3, 2, 1)}
    assert found == {100: 100, 51: 100, 50: 50, 26: 50, 25: 25, 13: 13, 7: 7, 3: 4, 2: 2, 1: 2}


def test_logits_that_are_not_finite_are_named(coca):
    sampler = StaticSampler(coca, SETTINGS["greedy"], GraphCache(None))
    images, owners, names = job(coca, [1] * 3)
    images.values[0] = torch.full_like(images.values[0], torch.nan)
    with pytest.raises(UserError, match="not finite"):
        sampler.generate(images, owners, names)
