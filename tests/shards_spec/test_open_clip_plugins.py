"""open_clip's private parts that we replace: they are there and called as we expect, and what happens without them."""

import inspect
import json
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

import open_clip
import pytest
import torch
from small_data import tiny_coca

import training.models.mobileclip  # noqa: F401 - registers its names
from shards_spec import open_clip_plugins
from shards_spec.files import UserError
from shards_spec.models import load_model
from shards_spec.open_clip_plugins import MODEL_PARTS, READING_PARTS, TOWER_PARTS, missing_parts

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
BARE = """
import json, os, sys
import open_clip
for line in sys.stdin:
    if not os.fork():
        exec(json.loads(line), {"__name__": "__main__"})
        print("done")
        sys.exit()
    os.wait()
    print("end", flush=True)
"""


@pytest.fixture(scope="module")
def run_bare():
    """Runs code in a fork of a process that has imported open_clip and nothing of ours; returns the lines it prints."""
    command = [sys.executable, "-c", BARE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as server:

        def run(code: str) -> list[str]:
            print(json.dumps(code), file=server.stdin, flush=True)
            *lines, last = (line.rstrip("\n") for line in takewhile(lambda line: line != "end\n", server.stdout))
            assert last == "done", "the traceback is on stderr"
            return lines

        yield run


def test_the_installed_open_clip_has_every_part_that_is_replaced():
    assert missing_parts([*READING_PARTS, *MODEL_PARTS, *TOWER_PARTS]) == []
    assert missing_parts(["factory.no_such_part", "nowhere.at_all"]) == ["factory.no_such_part", "nowhere.at_all"]
    assert open_clip_plugins.unavailable == {}


def test_open_clip_calls_the_parts_as_we_expect(run_bare):
    """In a process of its own, where nothing has been replaced yet."""
    code = """
import inspect, open_clip
for part in (open_clip.factory.load_checkpoint, open_clip.factory.load_state_dict, open_clip.factory.create_model,
             open_clip.factory.convert_state_dict):
    print(part.__name__, *list(inspect.signature(part).parameters)[:2])
for part in (open_clip.model._build_text_tower, open_clip.model._build_vision_tower):
    print(part.__name__, *list(inspect.signature(part).parameters)[:3])
print(inspect.signature(open_clip.factory.load_state_dict).parameters["weights_only"].default)
print("force_preprocess_cfg" in inspect.signature(open_clip.factory.create_model).parameters)
"""
    assert run_bare(code) == [
        "load_checkpoint model checkpoint_path",
        "load_state_dict checkpoint_path device",
        "create_model model_name pretrained",
        "convert_state_dict model state_dict",
        "_build_text_tower embed_dim text_cfg quick_gelu",
        "_build_vision_tower embed_dim vision_cfg quick_gelu",
        "True",
        "True",
    ]
    source = inspect.getsource(open_clip.factory)
    for call in ("load_checkpoint(\n", "load_state_dict(checkpoint_path", "convert_state_dict(model, state_dict)"):
        assert call in source, "open_clip looks the function up by its global name, so that a replacement is called"


class Tower(torch.nn.Module):
    """A tower that remembers how it was built."""

    def __init__(self, *arguments, **options):
        super().__init__()
        self.built = arguments, options
        self.context_length = self.vocab_size = 7


def test_towers_of_descriptions_of_any_name_are_built(monkeypatch):
    for part in TOWER_PARTS:  # to be restored
        monkeypatch.setattr(open_clip.model, part.partition(".")[2], getattr(open_clip.model, part.partition(".")[2]))
    open_clip_plugins.register_towers("test", Tower, Tower)
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"width": 32, "heads": 2, "layers": 1, "vocab_size": 9, "tokenizer_kwargs": {"clean": "lower"}}
    build = open_clip.model.CustomTextCLIP
    both = build(8, {**vision, "tower": "test"}, {**text, "tower": "test"}, quick_gelu=True)
    rest = {name: value for name, value in text.items() if name != "tokenizer_kwargs"}
    assert both.visual.built == ((8, True), vision)
    assert both.text.built == ((8, True), rest)
    one = build(8, vision, {**rest, "tower": "test"})
    assert isinstance(one.visual, open_clip.transformer.VisionTransformer)
    assert one.text.built == ((8, False), rest)
    with pytest.raises(TypeError, match="tower"):  # open_clip refuses what it does not know
        build(8, {**vision, "tower": "other"}, rest)


def test_without_a_tower_part_open_clip_refuses_a_folder_with_such_a_tower(monkeypatch):
    monkeypatch.setattr(open_clip_plugins, "TOWER_PARTS", ("model._gone",))
    before = open_clip.model._build_vision_tower
    open_clip_plugins.register_towers("test", Tower, Tower)
    assert open_clip.model._build_vision_tower is before


def test_without_its_reading_parts_open_clip_reads_checkpoints_itself(tmp_path, monkeypatch):
    name = tiny_coca(tmp_path / "coca")
    with_ours = load_model(name)
    monkeypatch.setattr(open_clip_plugins, "READING_PARTS", ("factory.no_such_part",))

    def never(*_):
        raise AssertionError("our reader was called")

    monkeypatch.setattr(open_clip_plugins, "load_checkpoint", never)
    alone = load_model(name)
    for key, value in with_ours.model.state_dict().items():
        assert torch.equal(alone.model.state_dict()[key], value), key


def test_without_its_model_parts_our_architectures_are_refused_by_name_and_others_load(run_bare, tmp_path):
    code = f"""
from shards_spec import open_clip_plugins
open_clip_plugins.MODEL_PARTS = ("model._gone", "factory.create_model")
from shards_spec.files import UserError
from shards_spec.models import load_model
for name in ("MobileCLIP-tiny", "SiCLIP-S0"):
    try:
        load_model(name, random_weights=True)
    except UserError as error:
        print(error)
print(load_model({tiny_coca(tmp_path / "coca")!r}).image_size)
"""
    reason = f"open_clip {open_clip.__version__} has no model._gone; install open_clip_torch>=3.1,<4"
    assert run_bare(code) == [
        f"model 'MobileCLIP-tiny' cannot be built: {reason}",
        f"model 'SiCLIP-S0' cannot be built: {reason}",
        "32",
    ]


def test_models_of_ours_are_found_by_name_without_importing_training(run_bare):
    """As `cache` and others do."""
    code = """
from shards_spec.models import load_model
print(load_model("MobileCLIP-tiny", random_weights=True).mean)
"""
    assert run_bare(code) == ["(0.0, 0.0, 0.0)"]


def test_transformers_answer_for_remote_code_is_restored(monkeypatch):
    pytest.importorskip("transformers")
    from transformers import dynamic_module_utils

    def inside() -> None:
        with open_clip_plugins.without_remote_code_prompt():
            assert dynamic_module_utils.TIME_OUT_REMOTE_CODE == 0
            raise UserError("x")

    before = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    with pytest.raises(UserError):
        inside()
    assert before == dynamic_module_utils.TIME_OUT_REMOTE_CODE
    monkeypatch.delattr(dynamic_module_utils, "TIME_OUT_REMOTE_CODE")
    with open_clip_plugins.without_remote_code_prompt():
        assert not hasattr(dynamic_module_utils, "TIME_OUT_REMOTE_CODE")
