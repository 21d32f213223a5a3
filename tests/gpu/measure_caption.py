"""Captioning with CoCa ViT-L/14 in bf16: images encoded, captions of 30 tokens by top-k 50, with and without graphs."""

import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from caption import Writer, bytes_read, reading_limit
from figures import ceiling, figure, options, run_parts, seconds_of, synchronize
from photos import small_photo
from small_data import draw, tiny_coca
from torch import Tensor

from pipeline.caption.captioner import Captioner
from pipeline.caption.coca import Coca, EncodedImages
from pipeline.caption.config import CaptionConfig
from pipeline.caption.requests import CaptionRequest
from pipeline.caption.stage import CaptionTools, caption, decoded_requests
from pipeline.core.render_pool import rendering_processes
from pipeline.plan.costs import FLOP
from shards_spec.files import join
from shards_spec.layout import raw_tar, shard_name
from shards_spec.manifest import Done, write_stage
from shards_spec.models import LoadedModel, load_model
from shards_spec.sample import Sample
from shards_spec.tar import write_shard

IMAGE = "image, CoCa ViT-L/14"
FIVE_CAPTIONS = "five captions of 30 tokens, CoCa ViT-L/14"
KERNELS = 15  # that took most time, printed


def build_coca(dry: bool, device: str, work: Path) -> tuple[str, LoadedModel]:
    """Name and model: CoCa ViT-L/14 in bf16 with random weights, which are made on the device; a tiny one when dry."""
    name = tiny_coca(work / "captioner") if dry else "coca_ViT-L-14"
    with torch.device(device):
        loaded = load_model(name, device=device, random_weights=not dry, precision="bf16")
    if not dry:
        torch.nn.init.normal_(loaded.model.text_decoder.text_projection, std=0.02)  # open_clip leaves it as it finds it
    return name, loaded


class Measurement:
    """Figures of one model: ``tokens`` with the start token, as open_clip counts."""

    def __init__(self, loaded: LoadedModel, dry: bool, device: str) -> None:
        self.loaded = loaded
        self.coca = Coca(loaded.model, loaded.tokenizer)
        self.device = device
        self.tokens = 12 if dry else 30
        self.repeat = 1 if dry else 3
        self.reading = reading_limit(device)
        self.eager = Writer(self.coca, self.tokens, graphs=False)

    def images(self, count: int) -> Tensor:
        """Noise (count, 3, S, S) on the device."""
        side = self.loaded.image_size
        return torch.randn(count, 3, side, side, device=self.device, dtype=self.coca.dtype)

    def encoding(self, batch: int, rate_of: str) -> float:
        """Report and return the seconds of encoding a batch; ``rate_of``: the job of `plan` that it is the rate of."""
        images = self.images(batch)
        seconds = seconds_of(lambda: self.coca.encode_images(images), self.device, repeat=self.repeat)
        rate = batch / seconds
        share = FLOP[IMAGE] * 1e9 * rate / ceiling(self.device)
        figure(f"caption: images encoded, {batch} at a time", rate, "images/s", rate=rate_of, share_of_ceiling=share)
        return seconds

    def writing(self, batch: int, captions: int, encoding: float, rate_of: str) -> None:
        """Report captions per second; ``encoding`` is the seconds of encoding the batch."""
        encoded = self.coca.encode_images(self.images(batch))
        writer = Writer(self.coca, self.tokens, graphs=True)
        before = bytes_beside_torch(self.device)
        capturing = self.seconds_of_capturing(writer, encoded, captions)
        of_graphs = bytes_beside_torch(self.device) - before
        with_graphs = self.seconds(writer, encoded, captions)
        eagerly = self.seconds(self.eager, encoded, captions)
        number = batch * captions
        read = bytes_read(self.coca, batch, captions, self.tokens)
        figure(
            f"caption: {batch} images, {captions} captions each",
            number / (encoding + with_graphs),
            "captions/s",
            goal="3 times the eager loop",
            eager=number / (encoding + eagerly),
            ratio=(encoding + eagerly) / (encoding + with_graphs),
            ratio_of_decoding=eagerly / with_graphs,
            ms_a_token=1e3 * with_graphs / (self.tokens - 1),
            share_of_encoding=encoding / (encoding + with_graphs),
            share_of_reading=read / with_graphs / (1e9 * self.reading),
            graphs=len(writer.sampler.graphs),
            s_of_capturing=capturing - with_graphs,
            MB_of_graphs=of_graphs / 1e6,
        )
        if captions == 5:
            name = f"caption: five captions written, {batch} images at a time"
            share = FLOP[FIVE_CAPTIONS] * 1e9 * batch / with_graphs / ceiling(self.device)
            figure(name, batch / with_graphs, "images/s", rate=rate_of, share_of_ceiling=share)

    def seconds(self, writer: Writer, encoded: EncodedImages, captions: int) -> float:
        """Median seconds of writing the captions."""
        return seconds_of(lambda: writer.write(encoded, captions), self.device, repeat=self.repeat)

    def seconds_of_capturing(self, writer: Writer, encoded: EncodedImages, captions: int) -> float:
        """Seconds of writing a batch the second time, when graphs are captured."""
        writer.write(encoded, captions)
        synchronize(self.device)
        start = time.perf_counter()
        writer.write(encoded, captions)
        synchronize(self.device)
        return time.perf_counter() - start

    def captioner(self, batch: int, captions: int) -> Captioner:
        """Report a captioner's batches with what the host does: copying images, naming captions, decoding texts."""
        captioner = Captioner(self.loaded, self.eager.decoding, captions, batch_size=batch)
        side = captioner.image_size
        images = np.random.default_rng(0).integers(256, size=(batch, side, side, 3), dtype=np.uint8)
        indices = tuple(range(captions))
        requests = [CaptionRequest(f"{number:09d}", image, indices) for number, image in enumerate(images)]
        stacks = [captioner.stack(requests), captioner.stack(requests)]

        def alone() -> None:
            captioner.caption(requests, images=stacks[0])

        def one_ahead() -> None:
            for images, upcoming in (stacks, reversed(stacks)):
                captioner.caption(requests, images=images, upcoming=upcoming)

        apart = seconds_of(alone, self.device, repeat=self.repeat, warm_up=3)
        seconds = seconds_of(one_ahead, self.device, repeat=self.repeat) / 2
        stacking = seconds_of(lambda: captioner.stack(requests), self.device, repeat=self.repeat)
        figure(
            f"caption: a captioner's batches of {batch}, {captions} captions each",
            batch * captions / seconds,
            "captions/s",
            ms_a_batch=1e3 * seconds,
            ms_a_batch_on_its_own=1e3 * apart,
            ms_of_stacking=1e3 * stacking,
        )
        return captioner

    def stage(self, captioner: Captioner, config: CaptionConfig, shards: int, samples: int) -> None:
        """Report the whole stage on ``shards`` of ``samples`` photos, with reading and writing, and reading alone.

        The first shard is read once more before: then the processes have started. The stage runs with these, and then
        from its start.
        """
        tools = CaptionTools.of(captioner, config, self.device, devices=1)

        def read(shard: int) -> None:
            for _ in decoded_requests(raw_tar(config.root, shard), tools, config):
                pass

        read(0)
        start = time.perf_counter()
        for shard in range(shards):
            read(shard)
        reading = shards * samples / (time.perf_counter() - start)
        workers = rendering_processes(config.processes, self.device, devices=1) or config.threads
        figure("caption: photos read and decoded", reading, "images/s", workers=workers)

        def whole(beginning: str, given: CaptionConfig) -> None:
            with patch("pipeline.caption.stage._load", lambda *_: captioner):
                summary = caption(given)
            figure(
                f"caption: {beginning} on photos, {config.num_captions} captions each",
                shards * samples * config.num_captions / summary.seconds,
                "captions/s",
                ms_a_batch=1e3 * summary.seconds * config.batch_size / (shards * samples),
                images_of_a_shard=samples,
            )

        with patch.object(CaptionTools, "of", return_value=tools):
            whole("the stage with its processes running", replace(config, name="running"))
        whole("the whole stage", config)

    def without_kernel(self, batch: int, captions: int) -> None:
        """Report the time of writing with torch's attention in place of `attention_kernel`'s."""
        encoded = self.coca.encode_images(self.images(batch))
        blocks = [*self.coca.text_blocks, *self.coca.blocks]
        kernel = blocks[0].attend
        for block in blocks:
            block.attend = None
        writer = Writer(self.coca, self.tokens, graphs=True)
        seconds = seconds_of(lambda: writer.write(encoded, captions), self.device, repeat=self.repeat, warm_up=2)
        for block in blocks:
            block.attend = kernel
        name = f"caption: {batch} images, {captions} captions each, torch's attention"
        figure(name, 1e3 * seconds / (self.tokens - 1), "ms a token")

    def nucleus(self, batch: int, captions: int) -> None:
        """Report nucleus sampling at its slowest: with random weights nearly all tokens are in the nucleus."""
        encoded = self.coca.encode_images(self.images(batch))
        writer = Writer(self.coca, self.tokens, graphs=True, method="nucleus")
        seconds = seconds_of(lambda: writer.write(encoded, captions), self.device, repeat=self.repeat, warm_up=2)
        name = f"caption: {batch} images, {captions} captions each, large nuclei"
        figure(name, 1e3 * seconds / (self.tokens - 1), "ms a token", graphs=len(writer.sampler.graphs))

    def kernels(self, batch: int, captions: int) -> None:
        """Print which kernels take the time of writing; it is no figure."""
        encoded = self.coca.encode_images(self.images(batch))
        writer = Writer(self.coca, self.tokens, graphs=True)
        for _ in range(3):
            writer.write(encoded, captions)
        kind = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[kind.CPU if self.device == "cpu" else kind.CUDA]) as profile:
            writer.write(encoded, captions)
            synchronize(self.device)
        print(f"{batch} images, {captions} captions each:")
        order = f"self_{'cpu' if self.device == 'cpu' else 'device'}_time_total"
        print(profile.key_averages().table(sort_by=order, row_limit=KERNELS, max_name_column_width=90), flush=True)


def bytes_beside_torch(device: str) -> int:
    """Bytes in use on a CUDA device that are not of torch's tensors: kernels, libraries, and what graphs consist of."""
    if not device.startswith("cuda"):
        return 0
    free, total = torch.cuda.mem_get_info()
    return int(total - free - torch.cuda.memory_reserved())


def write_photos_as_raw(root: str, photos: list[bytes], shards: int, samples: int) -> None:
    """ROOT/raw as `ingest` leaves it: ``shards`` of ``samples``, of these photos in turn."""
    for shard in range(shards):
        keys = [f"{shard:05d}{index:04d}" for index in range(samples)]
        members = [{"jpg": photos[index % len(photos)], "txt": b"a photo"} for index in range(samples)]
        path = f"raw/{shard_name(shard)}.tar"
        _, digest = write_shard(join(root, path), list(map(Sample, keys, members)))
        Done("ingest", shard, {}, {"success": samples}, {}, {path: digest}).write(join(root, "raw"))
    write_stage(root, "ingest", {"shards": shards, "counts": {"success": shards * samples}})


def main() -> int:
    """Measure and report."""
    where = options(__doc__)
    name, loaded = build_coca(where.dry, where.device, where.work)
    measurement = Measurement(loaded, where.dry, where.device)
    sizes = (2,) if where.dry else (256, 64)

    def encode_and_write(batch: int) -> None:
        is_usual = batch == sizes[0]
        encoding = measurement.encoding(batch, IMAGE if is_usual else "")
        for captions in (1, 5):
            measurement.writing(batch, captions, encoding, FIVE_CAPTIONS if is_usual else "")

    def captioner_and_stage() -> None:
        captioner = measurement.captioner(sizes[0], 5)
        root = str(where.work / "photos-to-caption")
        photos = [draw("a shape")[0]] if where.dry else list(map(small_photo, range(12)))
        shards = 1 if where.dry else 4
        samples = 4 * sizes[0]
        write_photos_as_raw(root, photos, shards, samples)
        decoding = measurement.eager.decoding
        given = CaptionConfig(root, name, decoding=decoding, device=where.device, precision="bf16", batch_size=sizes[0])
        measurement.stage(captioner, given, shards, samples)

    few = (1,) if where.dry else (1, 5)
    return run_parts(
        partial(encode_and_write, sizes[0]),
        *(partial(encode_and_write, batch) for batch in sizes[1:]),
        *(partial(measurement.without_kernel, sizes[0], captions) for captions in few),
        partial(measurement.nucleus, sizes[0], 5),
        captioner_and_stage,
        *(partial(measurement.kernels, sizes[0], captions) for captions in few),  # last: it may slow what follows
    )


if __name__ == "__main__":
    sys.exit(main())
