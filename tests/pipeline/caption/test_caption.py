"""The caption stage: the same caption whatever the batch, unusable ones sampled again, ratings, memory, devices."""

import multiprocessing
import resource
from dataclasses import replace
from itertools import chain, product
from pathlib import Path

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch
from small_data import narrow_coca, tiny_coca, tree, write_coca, write_raw
from warm_process import warm_context

from pipeline.caption.captioner import Captioner
from pipeline.caption.coca import Coca
from pipeline.caption.config import CaptionConfig
from pipeline.caption.cuda_graphs import GraphCache
from pipeline.caption.decoding import Decoding
from pipeline.caption.head_check import ContrastiveHeadCheck
from pipeline.caption.requests import CaptionRequest
from pipeline.caption.shard_captions import caption_defect
from pipeline.caption.stage import caption
from pipeline.caption.static_sampling import StaticSampler
from shards_spec.files import UserError, join
from shards_spec.images import decode_rgb
from shards_spec.manifest import Done, read_dataset, read_done, shard_ids, write_stage
from shards_spec.models import load_model
from shards_spec.tar import read_shard, write_shard

pytestmark = pytest.mark.integration

SHORT = Decoding(min_tokens=2, max_tokens=8)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_coca(tmp_path_factory.mktemp("coca"))


@pytest.fixture
def root(tmp_path):
    write_raw(str(tmp_path / "ds"), shards=3, per_shard=10)
    return str(tmp_path / "ds")


def captions(root: str, name: str = "cap") -> dict[str, dict]:
    rows = {}
    for shard in shard_ids(join(root, "captions", name)):
        for row in pq.read_table(join(root, f"captions/{name}/{shard:05d}.parquet")).to_pylist():
            assert row["key"] not in rows
            rows[row["key"]] = row
    return rows


def texts(root: str, name: str = "cap") -> dict[str, list[str]]:
    return {key: row["captions"] for key, row in captions(root, name).items()}


def config(root: str, model: str, **more) -> CaptionConfig:
    return replace(CaptionConfig(root, model, name="cap", num_captions=3, decoding=SHORT), **more)


def test_captions_are_the_same_in_shuffled_and_split_shards_and_in_every_batch_size(root, model, tmp_path):
    caption(config(root, model))
    expected = texts(root)
    samples = list(chain.from_iterable(read_shard(join(root, f"raw/{shard:05d}.tar")) for shard in range(3)))
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(5)).tolist()
    for batch_size, sizes in ((1, [24]), (5, [1, 6, 17]), (24, [13, 11])):
        other, left = str(tmp_path / f"other{batch_size}"), [samples[place] for place in order]
        for shard, size in enumerate(sizes):
            _, digest = write_shard(join(other, f"raw/{shard:05d}.tar"), left[:size])
            Done("ingest", shard, {}, {"success": size}, {}, {f"raw/{shard:05d}.tar": digest}).write(join(other, "raw"))
            left = left[size:]
        write_stage(other, "ingest", {"shards": len(sizes), "counts": {"success": len(samples)}})
        caption(config(other, model, batch_size=batch_size))
        assert texts(other) == expected


def test_a_resumed_run_leaves_the_bytes_of_an_undisturbed_one(root, model, tmp_path):
    caption(config(root, model))
    before = tree(root)
    for victim in ("00001_stats.json", "00002.parquet", "00002_stats.json"):
        Path(root, "captions/cap", victim).unlink()
    assert caption(config(root, model)).made == 2
    assert tree(root) == before


def test_a_process_per_device_leaves_the_same_captions(root, model, monkeypatch):
    """They are forked from one that has torch; a test of `cache` has processes that start as usual."""
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: warm_context())
    caption(config(root, model))
    one = texts(root)
    summary = caption(config(root, model, name="two", device="cpu,cpu"))
    assert summary.made == 3
    assert texts(root, "two") == one


def test_processes_and_threads_leave_the_same_bytes(root, model, monkeypatch, caplog):
    """With images that do not decode or are not there, which are named and get no caption."""
    path = join(root, "raw/00001.tar")
    samples = list(read_shard(path))
    samples[2].members["jpg"] = b"<html>"
    del samples[5].members["jpg"]
    _, digest = write_shard(path, samples)
    done = read_done(join(root, "raw"), 1)
    replace(done, outputs={**done.outputs, "raw/00001.tar": digest}).write(join(root, "raw"))
    usual = config(root, model, batch_size=4, similarity=True)
    caption(replace(usual, threads=3))
    by_threads, warned = tree(join(root, "captions")), warnings_of(caplog)
    undecodable, without = samples[2].key, samples[5].key
    assert [message.partition(": ")[2] for message in warned] == [
        f"key {undecodable} does not decode: not an image; it gets no caption",
        f"key {without} key {without}: no image member among ['json', 'txt']; it gets no caption",
    ]
    assert [captions(root)[key]["captions"] for key in (undecodable, without)] == [[], []]
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: warm_context())
    caption(replace(usual, processes=2, overwrite=True))
    assert tree(join(root, "captions")) == by_threads
    assert warnings_of(caplog) == warned


def warnings_of(caplog) -> list[str]:
    """What was said about images that get no caption, since it was last asked."""
    found = [record.getMessage() for record in caplog.records if "it gets no caption" in record.getMessage()]
    caplog.clear()
    return found


def test_what_is_wrong_with_a_caption():
    assert caption_defect("", []) == "empty"
    assert caption_defect("... !", []) == caption_defect("12 34", []) == "degenerate"
    for loop in ("a a a", "the dog the dog the dog", "so very very very red", "on a wall on a wall on a wall"):
        assert caption_defect(loop, []) == "degenerate", loop
    for fine in ("a dog and a dog and a cat", "bora bora", "a a b", "ha ha had had it", "näive 犬"):
        assert caption_defect(fine, []) is None, fine
    assert caption_defect("a dog", ["a cat", "a dog"]) == "repeated"


def test_unusable_captions_are_sampled_again_a_bounded_number_of_times(root, model):
    cold = replace(SHORT, temperature=0.35)  # the same caption often
    counts = {}
    for redraws in (0, 1, 4):
        counts[redraws] = caption(config(root, model, redraws=redraws, decoding=cold, name=f"r{redraws}")).counters
    images = len(captions(root, "r0"))
    assert all(facts["captions"] == 3 * images for facts in counts.values())
    wrong = {redraws: facts.get("repeated", 0) + facts.get("degenerate", 0) for redraws, facts in counts.items()}
    assert wrong[0] > wrong[1] > wrong[4]
    assert "redrawn" not in counts[0]
    assert counts[1]["redrawn"] <= wrong[0]
    assert counts[4]["redrawn"] <= 4 * wrong[0]
    first, later = texts(root, "r0"), texts(root, "r4")
    for key, drawn in first.items():
        for index, text in enumerate(drawn):
            if not caption_defect(text, drawn[:index]):
                assert later[key][index] == text, "a caption that was right stays"
    again = config(root, model, redraws=4, decoding=cold, name="again", batch_size=2)
    caption(again)
    assert texts(root, "again") == later, "what is sampled again does not depend on the batch either"


def test_facts_are_totals_of_the_shards(root, model):
    summary = caption(config(root, model))
    done = [read_done(join(root, "captions/cap"), shard) for shard in range(3)]
    for name, number in summary.counters.items():
        assert sum(record.counters.get(name, 0) for record in done) == number
    assert read_dataset(root)["stages"]["caption/cap"]["facts"] == summary.counters
    rows = captions(root).values()
    lengths = list(chain.from_iterable(row["num_tokens"] for row in rows))
    cut = lengths.count(SHORT.max_tokens)
    assert summary.counters["cut at max_tokens"] == cut
    assert caption(config(root, model)).counters == summary.counters


@pytest.mark.parametrize("kind", ["tiny", "coca_roberta-ViT-B-32"])
def test_similarities_are_the_models_own_cosines(root, model, tmp_path, kind):
    if kind != "tiny":
        pytest.importorskip("transformers")
        model = narrow_coca(tmp_path / "coca", kind)
    caption(config(root, model, similarity=True))
    loaded = load_model(model)
    preprocess = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(**open_clip.get_model_preprocess_cfg(loaded.model)), is_train=False
    )
    rows = captions(root)
    for sample in read_shard(join(root, "raw/00001.tar")):
        row = rows[sample.key]
        with torch.no_grad():
            image = loaded.model.encode_image(preprocess(decode_rgb(sample.image))[None], normalize=True)
            tokens = loaded.tokenizer([sample.caption, *row["captions"]])
            cosines = (image @ loaded.model.encode_text(tokens, normalize=True).T)[0]
        assert row["original_similarity"] == pytest.approx(float(cosines[0]), abs=1e-5)
        assert row["similarities"] == pytest.approx(cosines[1:].tolist(), abs=1e-5)
    caption(config(root, model, name="plain"))
    assert texts(root, "plain") == texts(root)
    assert set(captions(root, "plain")["000010000"]) == {"key", "captions", "logprobs", "num_tokens"}


def test_a_prefix_is_part_of_the_caption_and_beams_come_best_first(root, model):
    beam = Decoding("beam", num_beams=4, min_tokens=2, max_tokens=8, prefix="a photo of")
    caption(config(root, model, decoding=beam, num_captions=2))
    for row in captions(root).values():
        assert all(text.startswith("a photo of") for text in row["captions"])
        length = [tokens + (tokens < beam.max_tokens) for tokens in row["num_tokens"]]  # the end token counts
        scores = [logprob / tokens for logprob, tokens in zip(row["logprobs"], length, strict=True)]
        assert scores[0] >= scores[1] - 1e-5


def requests_for(captioner: Captioner, count: int) -> list[CaptionRequest]:
    side = captioner.image_size
    images = np.random.default_rng(0).integers(256, size=(count, side, side, 3), dtype=np.uint8)
    indices = tuple(range(captioner.num_captions))
    return [CaptionRequest(f"{number:09d}", image, indices) for number, image in enumerate(images)]


def test_images_encoded_ahead_give_the_same_captions(root, model, monkeypatch):
    """As on a GPU: a batch is encoded once, before the texts of the one before it are decoded."""
    usual = config(root, model, batch_size=4, decoding=replace(SHORT, temperature=0.35), redraws=2)
    caption(usual)
    order = list[str]()

    def logged(method):
        def call(self, *arguments):
            order.append(method.__name__)
            return method(self, *arguments)

        return call

    class Ahead(Captioner):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.encodes_ahead = True

    monkeypatch.setattr("pipeline.caption.captioner.Captioner", Ahead)
    monkeypatch.setattr(Coca, "encode_images", logged(Coca.encode_images))
    monkeypatch.setattr(Captioner, "stack", logged(Captioner.stack))
    monkeypatch.setattr(Captioner, "caption", logged(Captioner.caption))
    caption(replace(usual, name="ahead", overwrite=True))
    assert texts(root, "ahead") == texts(root)
    shard = order[: order.index("caption") + 1]
    assert shard == ["stack", "encode_images", "stack", "caption"], "before the first batch the second one is fetched"
    assert order.count("encode_images") == order.count("stack"), "a batch was encoded twice"


def test_the_sampler_of_a_gpu_writes_the_same_captions(root, model, monkeypatch):
    """The whole stage in static memory, with a lack of memory on the way."""
    usual = config(root, model, batch_size=5, decoding=replace(SHORT, temperature=0.35), redraws=2)
    caption(usual)
    sizes = list[int]()

    class Sampler(StaticSampler):
        def generate(self, images, owners, names):
            sizes.append(len(images.features))
            if len(images.features) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().generate(images, owners, names)

    class OfGpu(Captioner):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.encodes_ahead = True
            self.sampler = Sampler(self.coca, self.decoding, GraphCache(None))

    monkeypatch.setattr("pipeline.caption.captioner.Captioner", OfGpu)
    caption(replace(usual, name="static"))
    assert texts(root, "static") == texts(root)
    assert sizes[:2] == [5, 2], "halved"
    assert max(sizes[1:]) <= 3
    few = Captioner(load_model(model), SHORT, 3)
    of_gpu = OfGpu(load_model(model), SHORT, 3)
    assert of_gpu.bytes_per_image() > few.bytes_per_image()


def shallow(folder: Path) -> str:
    """coca_ViT-B-32 with its widths and few layers: what a batch takes stands out of what a process takes anyway."""
    import open_clip

    config = open_clip.get_model_config("coca_ViT-B-32")
    config["vision_cfg"] |= {"layers": 1, "image_size": 64}
    config["text_cfg"] |= {"layers": 4}
    config["multimodal_cfg"] |= {"layers": 4}
    return write_coca(folder, config)


def _caption_in_little_memory(pipe, model: str) -> None:
    torch.set_num_threads(1)
    loaded = load_model(model)
    captioner, too_many = Captioner(loaded, SHORT, 4, batch_size=64), Captioner(loaded, SHORT, 20_000, batch_size=1)
    batch, large = requests_for(captioner, 64), requests_for(too_many, 1)
    captioner.caption(batch[:1])
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 200 * 2**20,) * 2)
    answers = captioner.caption(batch)
    pipe.send((captioner.batch_size, [[c.text for c in answer.captions] for answer in answers]))
    try:
        too_many.caption(large)
        pipe.send("no error")
    except UserError as error:
        pipe.send(str(error))


@pytest.mark.slow
def test_a_batch_that_does_not_fit_into_memory_is_halved(tmp_path):
    """A real limit on the process' memory; the captions are those of a process that has enough."""
    model = shallow(tmp_path)
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_caption_in_little_memory, args=(send, model))
    child.start()
    send.close()
    batch_size, answers = receive.recv()
    assert 1 <= batch_size < 64
    enough = Captioner(load_model(model), SHORT, 4, batch_size=64)
    assert answers == [[c.text for c in answer.captions] for answer in enough.caption(requests_for(enough, 64))]
    assert "out of memory with one image at a time" in receive.recv()
    child.join()


def _grown(pipe, model: str, batch: int) -> None:
    """Bytes that a batch adds to this process at its worst moment, and what was predicted."""
    torch.set_num_threads(1)
    captioner = Captioner(load_model(model), SHORT, 4, batch_size=batch)
    work = requests_for(captioner, batch)
    captioner.caption(work[:1])
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark becomes what is used now
    start = _high_water()
    captioner.caption(work)
    pipe.send((1024 * (_high_water() - start), captioner.bytes_per_image()))


def _high_water() -> int:
    """KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


@pytest.mark.slow
def test_the_memory_of_a_batch_is_predicted(tmp_path):
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_grown, args=(send, shallow(tmp_path), 64))
    child.start()
    send.close()
    grown, predicted = receive.recv()
    child.join()
    print(f"64 images took {grown / 2**20:.0f} MiB, predicted {64 * predicted / 2**20:.0f} MiB")
    assert grown < 64 * predicted < 8 * grown


def test_the_batch_is_chosen_for_the_device(model):
    loaded = load_model(model)
    assert Captioner(loaded, SHORT, 3).batch_size == 32
    assert Captioner(loaded, SHORT, 3, batch_size=7).batch_size == 7
    few = Captioner(loaded, SHORT, 1).bytes_per_image()
    assert Captioner(loaded, SHORT, 9).bytes_per_image() > 3 * few


def test_devices_and_numbers_are_checked(root, model):
    with pytest.raises(UserError, match="--batch-size 0"):
        config(root, model, batch_size=0)
    with pytest.raises(UserError, match="--processes -1"):
        config(root, model, processes=-1)
    with pytest.raises(UserError, match="--redraws -1"):
        config(root, model, redraws=-1)
    with pytest.raises(UserError, match=r"--num-captions .: must be at most 1 with --method greedy"):
        config(root, model, decoding=Decoding("greedy"))
    with pytest.raises(UserError, match="--device 'foo': give auto, cpu, cuda or cuda:N"):
        caption(config(root, model, device="foo"))
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="this torch sees no CUDA device"):
            caption(config(root, model, device="cpu,cuda:1"))


def head_warnings(root, model, caplog, **options) -> list[str]:
    caplog.clear()
    caption(config(root, model, similarity=True, overwrite=True, num_captions=1, **options))
    return [record.message for record in caplog.records if "original captions are no closer" in record.message]


@pytest.mark.parametrize("batch_size", [1, 5, 32])
def test_heads_that_cannot_tell_images_apart_are_named_per_shard(root, model, caplog, batch_size):
    """Random weights say nothing. The same weights with the captions that they rate highest for each image do."""
    found = head_warnings(root, model, caplog, batch_size=batch_size)
    assert [message.partition(":")[0][-9:] for message in found] == ["00000.tar", "00001.tar", "00002.tar"]
    assert all("shuffled" in message and "8 images" in message and "another tag" in message for message in found)
    loaded = load_model(model)
    captioner = Captioner(loaded, SHORT, 1)
    first = ("red", "dog", "of", "sky", "night")
    second = ("one", "cat", "in", "snow", "the", "sea")
    words = [" ".join(pair) for pair in product(first, second)]
    for shard in range(3):
        path = join(root, f"raw/{shard:05d}.tar")
        samples = list(read_shard(path))
        with torch.no_grad():
            images = np.concatenate([captioner.preprocess(decode_rgb(sample.image)) for sample in samples])
            pixels = captioner.pixels(torch.from_numpy(images))
            cosines = loaded.model.encode_image(pixels, normalize=True) @ captioner.coca.text_features(words).T
        best = (cosines - cosines.mean(0)).argmax(1).tolist()
        for sample, place in zip(samples, best, strict=True):
            sample.members["txt"] = words[place].encode()
        _, digest = write_shard(path, samples)
        done = read_done(join(root, "raw"), shard)
        replace(done, outputs={**done.outputs, f"raw/{shard:05d}.tar": digest}).write(join(root, "raw"))
    assert head_warnings(root, model, caplog, batch_size=batch_size) == []


def test_too_few_or_equal_captions_give_no_warning():
    features = torch.nn.functional.normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    for images, texts, warns in (
        (features, ["a"] * 6, False),  # equal captions score as shuffled ones do, whatever the heads
        (features[:2], ["a", "b"], False),
        (features, list("abcdef"), True),
    ):
        check = ContrastiveHeadCheck()
        for row, text in enumerate(texts):
            check.add(images[row : row + 1], features[(row + 1) % len(images)][None], [text])
        assert bool(check.warning()) == warns
    check = ContrastiveHeadCheck()
    check.add(features, features, list("abcdef"))
    assert check.warning() is None
    shuffled = (features @ features.T).fill_diagonal_(0).sum().item() / 30
    others = ContrastiveHeadCheck()
    others.add(features, features.roll(1, 0), list("abcdef"))
    rest = features @ features.roll(1, 0).T
    expected = (rest.sum() - rest.diagonal().sum()).item() / 30
    assert f"shuffled {expected:.4f}" in others.warning()
    assert abs(expected - shuffled) > 1e-3  # the own pairs are left out of each
