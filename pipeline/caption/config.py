"""Settings of the stage `caption`: what its command line shows."""

import os
import re
from dataclasses import dataclass, field, fields

from tyro.conf import OmitArgPrefixes

from pipeline.caption.decoding import Decoding
from pipeline.core.command_line import Root
from pipeline.core.model_choice import ModelChoice
from shards_spec.files import UserError
from shards_spec.messages import flag, require
from shards_spec.models import Trust, model_label
from shards_spec.names import check_name
from shards_spec.precision import PrecisionOption

# options of a model run here
ONLY_HERE = ("model", "pretrained", "similarity", "precision", "batch_size", "processes", "device")
OF_SAMPLING = ("redraws", "seed", "threads")  # those of a server's model, too


@dataclass(frozen=True)
class ListOptions:
    """Captions of others, from files."""

    from_: tuple[str, ...] | None = None
    """captions of others in place of a model's: Parquet, JSON Lines, CSV or TSV with a header, also .gz; files, folders
    or globs; a row has an image and its caption, or a list of them"""
    by: str = "auto"
    """column of raw/ that says of which image a row is: uid, url, sha256 (of the image's file), key or any other; auto:
    the first of these four that both have"""
    by_col: str | None = None
    """what --from calls that column; by default as raw/ does"""
    caption_col: tuple[str, ...] = ()
    """columns of --from with captions; found by its name when not given"""

    def __post_init__(self) -> None:
        is_given = self.from_ is None or ("" not in self.from_ and self.from_ != ())
        require(is_given, "from_", self.from_, "a file, folder or glob; is a variable of the shell unset?")

    @property
    def sources(self) -> tuple[str, ...]:
        """What --from names."""
        return self.from_ or ()


@dataclass(frozen=True)
class ServerOptions:
    """Captions by a model that a server runs."""

    server: str | None = None
    """endpoint that writes the captions, OpenAI-compatible as vLLM's: http://localhost:8000/v1; its key, where it needs
    one, is in the environment variable CLIPMILL_API_KEY"""
    server_model: str = ""
    """name of the server's model"""
    prompt: str = "Describe this image in one short sentence."
    """what is asked of every image"""
    image_side: int = 512
    """pixels of the longer side of the images that are sent (as JPEG); smaller ones are not enlarged"""
    concurrency: int = 64
    """requests in flight"""
    request_timeout_s: float = 120.0
    """seconds for one request"""
    retries: int = 4
    """further tries, after a growing pause, where one can help: a time-out, a lost connection, an answer 429 or 5xx"""
    retry_failed: bool = False
    """after a finished run: ask again about the images that the server failed at"""

    def __post_init__(self) -> None:
        for name in ("image_side", "concurrency"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        require(self.retries >= 0, "retries", self.retries, "0 or more")
        require(self.request_timeout_s > 0, "request_timeout_s", self.request_timeout_s, "seconds above 0")
        if self.server is None:
            return
        is_address = re.fullmatch(r"https?://[^/?#@\s]+[^?#@\s]*", self.server) is not None
        require(is_address, "server", self.server, "http://HOST:PORT/v1 or https://..., without a user or a query")
        if not self.server_model:
            raise UserError("--server: name its model with --server-model (GET /v1/models lists what it serves)")


@dataclass(frozen=True)
class CaptionConfig(ModelChoice):
    """Write N synthetic captions per image with an open_clip CoCa model, take them from files, or ask a server."""

    DEFAULT = ("coca_ViT-L-14", "mscoco_finetuned_laion2b_s13b_b90k")

    root: Root
    """the dataset: a folder or an fsspec URL; reads raw/, writes captions/NAME/"""
    model: str = DEFAULT[0]
    """open_clip name of a CoCa model, local-dir:PATH or hf-hub:ORG/NAME"""
    pretrained: str | None = None
    """open_clip tag or checkpoint file; of the default model by default mscoco_finetuned_laion2b_s13b_b90k"""
    name: str | None = None
    """folder below captions/; by default made from model and pretrained, the name of the first --from, or the server's
    model; several can stand side by side"""
    num_captions: int = 5
    """captions per image; with --from the most that are taken"""
    decoding: OmitArgPrefixes[Decoding] = field(default_factory=Decoding)
    redraws: int = 2
    """top_k, nucleus: how often an empty, looping or repeated caption is sampled again"""
    similarity: bool = False
    """also store each caption's cosine with its image by the model's contrastive heads, and the original's; warns of
    shards whose original captions score no better than shuffled ones"""
    precision: PrecisionOption = "auto"
    """auto: bf16 on a CUDA device that has it, else fp32"""
    batch_size: int | None = None
    """images at a time; by default what the device's memory holds, at most 512, on a CPU 32"""
    seed: int = 0
    """of the sampling; a caption depends on (seed, key, caption index) only"""
    processes: int | None = None
    """processes per device that decode ahead of it; by default one per core with CUDA devices, 0 (threads instead) with
    a CPU"""
    threads: int = os.cpu_count() or 1
    """threads that decode ahead where there are no such processes, or ahead of the server"""
    device: str = "auto"
    """auto (every CUDA device, else the CPU), cpu, cuda, cuda:N, or several with commas, a process each"""
    trust: OmitArgPrefixes[Trust] = field(default_factory=Trust)
    overwrite: bool = False
    """make finished shards again"""
    lists: OmitArgPrefixes[ListOptions] = field(default_factory=ListOptions)
    endpoint: OmitArgPrefixes[ServerOptions] = field(default_factory=ServerOptions)

    def __post_init__(self) -> None:
        self._check_writer()
        if self.is_of_others:
            check_name(self.label)
        else:
            self.choose_weights()
        require(self.batch_size is None or self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        require(self.processes is None or self.processes >= 0, "processes", self.processes, "0 or more")
        require(self.threads >= 1, "threads", self.threads, "1 or more")
        require(self.redraws >= 0, "redraws", self.redraws, "0 or more")
        require(self.num_captions >= 1, "num_captions", self.num_captions, "1 or more")
        if not self.lists.sources:
            self.decoding.check_num_captions(self.num_captions)

    @property
    def is_of_others(self) -> bool:
        """Whether no model is run here."""
        return bool(self.lists.sources) or self.endpoint.server is not None

    @property
    def label(self) -> str:
        """The name of the folder below captions/."""
        if self.name is not None or not self.is_of_others:
            return super().label
        if self.endpoint.server is not None:
            return model_label(self.endpoint.server_model, None)
        last = self.lists.sources[0].rstrip("/").rpartition("/")[2]
        return model_label(last.removesuffix(".gz").rpartition(".")[0] or last, None)

    def _check_writer(self) -> None:
        """Raise UserError unless one of a model, files and a server writes the captions, with its own options alone."""
        if self.lists.sources and self.endpoint.server is not None:
            raise UserError("--from and --server: give one of them, and run caption once for each")
        for options, owner in ((self.lists, "from_"), (self.endpoint, "server")):
            given = _changed(options)
            if given and owner not in given:
                raise UserError(f"{flag(given[0])} goes with {flag(owner)}, which is not given")
        if self.endpoint.retry_failed and self.overwrite:
            raise UserError("--retry-failed keeps the captions that are there, --overwrite does not: give one of them")
        if not self.is_of_others:
            return
        owner = "--from" if self.lists.sources else "--server"
        meaningless = ONLY_HERE if self.endpoint.server is not None else (*ONLY_HERE, *OF_SAMPLING)
        changed = [name for name in _changed(self) if name in meaningless]
        if self.lists.sources:
            changed += _changed(self.decoding)
        if self.name is None and "*" in "".join(self.lists.sources[:1]):
            raise UserError(f"--from {self.lists.sources[0]}: give these captions a name with --name")
        if changed:
            raise UserError(f"{flag(changed[0])} is of a model, whose place {owner} takes: leave it out")
        if self.endpoint.server is not None:
            is_possible = self.decoding.method != "beam"
            require(is_possible, "method", self.decoding.method, "greedy, top_k or nucleus with --server")
            require(not self.decoding.prefix, "prefix", self.decoding.prefix, "said in --prompt with --server")


def _changed(options: "CaptionConfig | Decoding | ListOptions | ServerOptions") -> list[str]:
    """The names of the options that are not as by default."""
    return [own.name for own in fields(options) if getattr(options, own.name) != own.default]
