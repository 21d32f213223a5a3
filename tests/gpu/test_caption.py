"""Captions on a device: graphs against the eager path, the CPU, half precision, full memory, predicted memory."""

import logging
from dataclasses import replace
from functools import partial
from itertools import chain, product

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from cuda_only import only_on_cuda
from small_data import tiny_coca, write_coca, write_raw
from torch.nn import functional as F

from pipeline.caption.captioner import Captioner
from pipeline.caption.coca import Coca
from pipeline.caption.config import CaptionConfig
from pipeline.caption.cuda_graphs import graphs_for
from pipeline.caption.decoding import Decoding
from pipeline.caption.requests import CaptionRequest
from pipeline.caption.sampling import DecodedTokens, generate, sample_token
from pipeline.caption.stage import caption
from pipeline.caption.static_sampling import StaticSampler
from shards_spec.files import join
from shards_spec.manifest import shard_ids
from shards_spec.models import LoadedModel, load_model

SHORT = Decoding(min_tokens=2, max_tokens=8)
METHODS = {
    "greedy": Decoding("greedy", min_tokens=2, max_tokens=12),
    "top_k": Decoding("top_k", top_k=20, min_tokens=1, max_tokens=12),
    "nucleus": Decoding(top_p=0.8, temperature=0.7, min_tokens=0, max_tokens=12),
    "penalty and prefix": Decoding("top_k", top_k=5, max_tokens=9, prefix="a red ball", repetition_penalty=1.3),
    "flat": Decoding(top_p=0.99, temperature=4.0, min_tokens=2, max_tokens=8),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return tiny_coca(tmp_path_factory.mktemp("coca"))


@pytest.fixture(scope="module")
def model(device, tiny, tmp_path_factory) -> str:
    """Two layers of CoCa ViT-B/32's widths, whose products are large enough for a GPU's usual kernels."""
    import open_clip

    if not device.startswith("cuda"):
        return tiny
    config = open_clip.get_model_config("coca_ViT-B-32")
    for part in ("vision_cfg", "text_cfg", "multimodal_cfg"):
        config[part] |= {"layers": 2}
    return write_coca(tmp_path_factory.mktemp("wide"), config)


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("data") / "ds"
    write_raw(str(root), shards=2, per_shard=10)
    return str(root)


def written(root: str, name: str) -> dict[str, list[str]]:
    folder = join(root, "captions", name)
    tables = [pq.read_table(join(folder, f"{shard:05d}.parquet")) for shard in shard_ids(folder)]
    return {row["key"]: row["captions"] for row in chain.from_iterable(table.to_pylist() for table in tables)}


def noise(loaded: LoadedModel, count: int) -> torch.Tensor:
    side = loaded.image_size
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def requests_for(captioner: Captioner, count: int) -> list[CaptionRequest]:
    side = captioner.image_size
    images = np.random.default_rng(0).integers(256, size=(count, side, side, 3), dtype=np.uint8)
    indices = tuple(range(captioner.num_captions))
    return [CaptionRequest(f"{number:09d}", image, indices) for number, image in enumerate(images)]


@pytest.fixture(scope="module")
def full_size(device) -> LoadedModel:
    """CoCa ViT-L/14 in bf16 with random weights."""
    only_on_cuda(device)
    with torch.device(device):
        loaded = load_model("coca_ViT-L-14", device=device, random_weights=True, precision="bf16")
    torch.nn.init.normal_(loaded.model.text_decoder.text_projection, std=0.02)
    return loaded


def texts(captioner: Captioner, requests: list[CaptionRequest]) -> list[str]:
    """All captions, one image after the other."""
    answers = captioner.caption(requests)
    return [caption.text for caption in chain.from_iterable(answer.captions for answer in answers)]


def alike(found: list[str], expected: list[str]) -> float:
    """Which share is the same."""
    return sum(one == other for one, other in zip(found, expected, strict=True)) / len(expected)


def share_alike(found: list[DecodedTokens], expected: list[DecodedTokens]) -> float:
    """How many captions are the same; the log-probabilities of those must be."""
    same = [pair for pair in zip(found, expected, strict=True) if pair[0].tokens == pair[1].tokens]
    for one, other in same:
        assert one.logprob == pytest.approx(other.logprob, rel=1e-4, abs=1e-3)
    return len(same) / len(expected)


@pytest.mark.parametrize("method", METHODS)
def test_graphs_write_the_captions_of_the_eager_path(device, model, caplog, method):
    """In float32. A row's last bit may depend on how many rows a product has: hardly any caption may differ."""
    decoding = METHODS[method]
    loaded = load_model(model, device=device)
    coca = Coca(loaded.model, loaded.tokenizer)
    count = 24 if device.startswith("cuda") else 12
    images = noise(loaded, count)
    captions = 1 if method == "greedy" else 3
    pairs = list(product(range(count), range(captions)))
    owners = [image for image, _ in pairs]
    names = [f"{image}/{n}" for image, n in pairs]
    first = generate(coca, coca.encode_images(images), owners, names, decoding)
    late = list(chain.from_iterable(caption.tokens[decoding.min_tokens + 1 :] for caption in first))
    coca.end = max(set(late) - {*coca.suppressed_tokens}, key=late.count)  # captions end at different places
    encoded = coca.encode_images(images)
    expected = generate(coca, encoded, owners, names, decoding)
    sampler = StaticSampler(coca, decoding, graphs_for(coca.device))
    if method == "flat":
        sampler.candidates = 64  # too few at first: captions are written again
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            assert share_alike(sampler.generate(encoded, owners, names), expected) >= 0.95
        few = slice(0, 5 * captions)
        some = sampler.generate(encoded.first(5), owners[few], names[few])
    assert share_alike(some, expected[few]) >= 0.9
    assert len({len(caption.tokens) for caption in expected}) > 1
    assert "pipeline.caption.cuda_graphs" not in [record.name for record in caplog.records], "a capture failed"
    assert bool(len(sampler.graphs)) == device.startswith("cuda")


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_for_attention_equals_torchs(device, precision):
    only_on_cuda(device)
    from pipeline.caption.attention_kernel import attend

    heads = 12
    width = 64
    rows = 37
    length = 40
    generator = torch.Generator(device).manual_seed(0)
    made = partial(torch.randn, device=device, generator=generator)
    keys = made(rows, heads, length, width).to(precision)
    values = made(rows, heads, length, width).to(precision)
    for past in (0, 1, 5, 16, 31, 39):
        new = made(rows, 1, 3 * heads * width).to(precision)
        found = attend(new, keys, values, past)
        query, key, value = new.view(rows, 1, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0)
        assert torch.equal(keys[:, :, past : past + 1], key)
        assert torch.equal(values[:, :, past : past + 1], value)
        read = slice(0, past + 1)
        expected = (
            F.scaled_dot_product_attention(query, keys[:, :, read], values[:, :, read]).transpose(1, 2).flatten(2)
        )
        torch.testing.assert_close(found, expected, rtol=2e-2 if precision != torch.float32 else 1e-4, atol=1e-2)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_kernel_for_layer_norms_equals_torchs(device, precision):
    only_on_cuda(device)
    from pipeline.caption.norm_kernel import add_norm

    x, delta = torch.randn(2, 300, 1, 768, device=device).to(precision)
    weight, bias = torch.randn(2, 768, device=device).to(precision)
    total = x + delta
    bound = 1e-5 if precision == torch.float32 else 2e-2
    expected = F.layer_norm(total, (768,), weight, bias, 1e-5)
    found = add_norm(x, delta, weight, bias, 1e-5)
    assert torch.equal(x, total)
    torch.testing.assert_close(found, expected, rtol=bound, atol=bound)


def test_the_kernels_for_choosing_equal_torchs(device):
    only_on_cuda(device)
    from pipeline.caption.sampling_kernels import log_totals, sample_incomplete

    generator = torch.Generator(device).manual_seed(0)
    for spread, top_p in ((0.01, 0.9), (1.0, 0.3), (1.0, 0.999), (4.0, 0.9)):
        scores = spread * torch.randn(300, 49408, device=device, generator=generator)
        seeds = torch.randint(-(2**62), 2**62, (300,), device=device, generator=generator)
        chosen = torch.full_like(seeds, -1)
        complete = torch.arange(300, device=device) % 3 == 0
        sample_incomplete(scores, seeds, top_p, chosen, complete)
        torch.testing.assert_close(log_totals(scores), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
        expected = sample_token(scores, Decoding(top_p=top_p), seeds)
        assert (chosen[complete] == -1).all()
        assert (chosen == expected)[~complete].float().mean() >= 0.99  # masses are float32 here


def test_captions_are_those_of_the_cpu(device, tiny, raw):
    config = CaptionConfig(raw, tiny, num_captions=3, decoding=SHORT, batch_size=8, precision="fp32", processes=2)
    caption(replace(config, device="cpu", name="cpu"))
    caption(replace(config, device=device, name="gpu"))
    cpu = written(raw, "cpu")
    found = written(raw, "gpu")
    expected = list(chain.from_iterable(cpu.values()))
    assert alike(list(chain.from_iterable(found[key] for key in cpu)), expected) >= 0.9
    assert len(set(expected)) > len(expected) / 2


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_writes_captions(device, model, precision):
    """Graphs in half precision: most captions of the eager path, where near ties fall to either side."""
    only_on_cuda(device)
    loaded = load_model(model, device=device, precision=precision)
    captioner = Captioner(loaded, SHORT, 3, batch_size=16)
    requests = requests_for(captioner, 32)
    with_graphs = texts(captioner, requests) + texts(captioner, requests)
    assert len(captioner.sampler.graphs) > 0
    captioner.sampler = None
    assert alike(with_graphs, 2 * texts(captioner, requests)) >= 0.8


def test_a_batch_that_does_not_fit_is_halved(device, model):
    """A real limit on the device's memory; the captions are those of a captioner that has enough."""
    only_on_cuda(device)
    decoding = Decoding("top_k", top_k=20, min_tokens=2, max_tokens=20)
    loaded = load_model(model, device=device)
    captioner = Captioner(loaded, decoding, 8, batch_size=256)
    requests = requests_for(captioner, 256)
    enough = texts(captioner, requests)
    del captioner
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    captioner = Captioner(loaded, decoding, 8, batch_size=256)
    room = torch.cuda.memory_reserved() + 60 * captioner.bytes_per_image()
    torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        halved = texts(captioner, requests)
        batch_size = captioner.batch_size
        for _ in range(3):
            again = texts(captioner, requests)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    print(f"batches of {batch_size} images, with graphs {captioner.batch_size}")
    assert 1 <= captioner.batch_size <= batch_size < 256
    assert alike(halved, enough) >= 0.95
    assert alike(again, enough) >= 0.95
    assert len(captioner.sampler.graphs) > 0


@pytest.mark.parametrize("decoding", [Decoding(), Decoding("top_k"), Decoding("beam")], ids=lambda d: d.method)
def test_a_batch_stays_within_its_prediction(full_size, decoding):
    """The full size, with its graphs: flat random weights make nucleus sampling look at every token."""
    batch = 32
    captioner = Captioner(full_size, decoding, 5, batch_size=batch)
    requests = requests_for(captioner, batch)
    predicted = batch * captioner.bytes_per_image()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    reserved = torch.cuda.memory_reserved()
    for _ in range(1 if decoding.method == "beam" else 3):
        captioner.caption(requests)
    peak = torch.cuda.max_memory_allocated() - before
    taken = torch.cuda.max_memory_reserved() - reserved
    print(f"{decoding.method}: {peak / 2**20:.0f} MiB, reserved {taken / 2**20:.0f}, predicted {predicted / 2**20:.0f}")
    assert peak < predicted < 8 * peak
