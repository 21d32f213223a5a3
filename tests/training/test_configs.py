"""Recipes' command lines: read without torch, checked at submission as by the command, options without effect."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.core.command_line import parse_several
from shards_spec.files import UserError
from shards_spec.unused_options import as_given, changed_fields, refuse_unused
from slurm.step import parse_steps
from training.config import smoke
from training.configs import command_line_parts, default_config
from training.recipes import RECIPES, STAGED

ROOT = Path(__file__).parents[2]
READ_ALL = """
import sys
from slurm.step import parse_steps
from training.configs import default_config
from training.recipes import RECIPES
for recipe in RECIPES:
    (step,) = parse_steps(["train", recipe, "--data", "D", "--out", "R", "--nodes", "2"])
    assert step.words == (recipe, "--data", "D", "--out", "R"), step.words
    assert (step.root, step.config.data.data, step.options.nodes) == ("R", "D", 2)
print(sorted({"torch", "timm", "open_clip", "transformers"} & set(sys.modules)))
"""


def test_no_recipes_command_line_takes_torch():
    done = subprocess.run([sys.executable, "-c", READ_ALL], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def parsed(recipe: str, *words: str):
    """The recipe's config, as `clipmill train` reads it."""
    return parse_several(f"train {recipe}", command_line_parts(recipe, words), ["--data", "D", *words])[0]


WRONG = (
    (("--batch-sise", "8"), "no option --batch-sise; did you mean --batch-size?"),
    (("--batch-size", "many"), "--batch-size: invalid literal for int()"),
    (("--lr", "-1"), "--lr -1.0: must be above 0"),
)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_submission_refuses_what_is_wrong(recipe):
    for words, message in WRONG[:2]:
        with pytest.raises(UserError) as error:
            submitted(recipe, *words)
        assert message in str(error.value)


@pytest.mark.parametrize(("words", "message"), WRONG)
def test_the_command_says_the_same_as_a_submission(words, message):
    with pytest.raises(UserError) as error:
        parsed("siclip", *words)
    with pytest.raises(UserError) as of_submit:
        submitted("siclip", *words)
    assert message in str(error.value)
    assert str(of_submit.value).replace("submit train", "train") == str(error.value)


def submitted(recipe: str, *words: str):
    """The step of a submission."""
    (step,) = parse_steps(["train", recipe, "--data", "D", "--out", "R", *words])
    return step


def test_a_submission_knows_which_of_the_words_are_the_recipes():
    step = submitted("catlip", "--sides", "128", "160", "--time", "9", "--flip=0.1")
    assert step.words == ("catlip", "--data", "D", "--out", "R", "--sides", "128", "160", "--flip=0.1")
    assert (step.options.time, step.config.sides.sides, step.config.views.flip) == ("9", (128, 160), 0.1)
    assert submitted("clip", "--smoke").config.data.batch_size == 8
    steps = parse_steps(
        ["pipeline", "DS", "--time", "7", "--", "pack", "--", "train", "clip", "--out", "R", "--nodes=2"]
    )
    assert [one.options.time for one in steps] == ["7", "7"]
    assert (steps[1].config.data.data, steps[1].options.nodes) == ("DS", 2)
    with pytest.raises(UserError, match="submit train clip: no option --gpu-per-node; did you mean --gpus-per-node"):
        submitted("clip", "--gpu-per-node", "2")
    with pytest.raises(UserError, match="--array 4 would not be used by a training, which is one job"):
        submitted("clip", "--array", "4")
    with pytest.raises(UserError, match="--nodes 1 would not be used by a stage"):
        parse_steps(["pack", "DS", "--nodes", "1"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("clip --scale None --flip 0.5", "--flip 0.5 would not be used with --scale None, the plain centre crop"),
        ("clip --magnitude 9", "--magnitude 9 would not be used with --ops 0"),
        ("clip --jitter-prob 0.5", "--jitter-prob 0.5 would not be used with --jitter 0 0 0 0"),
        ("clip --epochs 32 --steps 3", "--epochs 32.0 would not be used with --steps 3"),
        ("finetune --smoke --epochs 2", "--epochs 2.0 would not be used with --steps 4 (--smoke sets 4)"),
        (
            "clip --eval-data E --eval-every-epochs 2 --eval-every-steps 5",
            "--eval-every-epochs 2.0 would not be used with --eval-every-steps 5: leave one of them out",
        ),
        ("clip --eval-every-epochs 1", "--eval-every-epochs 1.0 would not be used without --eval-data"),
        ("clip --frozen-precision bf16", "--frozen-precision bf16 would not be used with --lock none: all weights are"),
        ("coca --frozen-precision bf16", "--frozen-precision bf16 would not be used by this recipe, which trains all"),
        ("clip --lock image", "--lock image: 'ViT-B-32' has no weights for its image tower, which would stay random"),
        ("clip --schedule constant --final-lr 0", "--final-lr 0.0 would not be used with --schedule constant"),
        ("catlip --warmup 0 --warmup-lr 1e-6", "--warmup-lr 1e-06 would not be used with --warmup 0"),
        ("tinyclip --layers interval", "--layers interval would not be used with --inherit none"),
        ("tinyclip --sparsity 0.25", "--sparsity 0.25 would not be used with --inherit none"),
        ("tinyclip --smoke --prune-step 2", "--prune-step 2 would not be used with --inherit none"),
        ("tinyclip --scale 0.9 1", "--scale 0.9 1.0 would not be used with --teacher-from cache"),
        ("tinyclip --inherit auto --teacher-weights x --model ViT-M-32", "--model ViT-M-32 would not be used with"),
        ("tinyclip --inherit manual", "--inherit manual needs --teacher-weights"),
        ("siclip --teacher-from cache --flip 0", "--flip 0.0 would not be used with --teacher-from cache"),
        ("siclip --teacher t", "--teacher t would not be used with --teacher-from live: say --teacher-from cache"),
        ("siclip --pm-weight 0 --pm-logits 2", "--pm-logits 2 would not be used with --pm-weight 0"),
        ("tinymim --target qkv --no-softmax", "--no-softmax would not be used with --target qkv"),
        ("tinymim --chain a,b --model c", "--model c would not be used with --chain, which names the students"),
        ("probe --layer-decay 0.5", "--layer-decay 0.5 would not be used with --freeze: the head alone is trained"),
        ("probe --no-augment --sides 128", "--sides 128 would not be used with --no-augment"),
        ("finetune --copy-bias", "--copy-bias would not be used without --class-map"),
        ("minivit --smoothing 0.1", "--smoothing 0.1 would not be used with --label-weight 0"),
        ("minivit --teacher none --label-weight 1 --hidden-weight 1", "--hidden-weight 1.0 would not be used with"),
        ("minivit --soft-labels s --teacher t", "--teacher t would not be used beside --soft-labels s: leave one out"),
    ],
)
def test_an_option_without_effect_is_refused_even_at_its_default(words, message):
    with pytest.raises(UserError) as error:
        parsed(*words.split())
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    "words",
    [
        "clip --scale None --flip 0",
        "clip --frozen-precision fp32",
        "clip --lock image --pretrained openai --precision bf16 --frozen-precision bf16",
        "clip --lock image --model local-dir:M",
        "clip --lock text --model roberta-ViT-B-32",
        "clip --steps 3 --eval-data E --eval-every-steps 2",
        "tinyclip --smoke --inherit auto --teacher-weights x --prune-step 3",
        "siclip --flip 0.5 --pm-weight 0",
        "minivit --teacher none --label-weight 1 --attention-weight 0 --hidden-weight 0",
        "minivit --smoothing 0",
        "probe --eval-every-epochs 2 --no-augment --lr 1e-3",
    ],
)
def test_an_option_with_an_effect_is_not(words):
    assert parsed(*words.split()).data.data == "D"


@pytest.mark.parametrize("recipe", RECIPES)
def test_numbers_of_a_recipe_are_never_refused(recipe):
    """Neither its own nor those of a trial, as far as nobody gave them: Python knows only what differs."""
    default = default_config(recipe)
    for config in (default, smoke(default)):
        assert changed_fields(config, default, smoke(default)) == set()
        refuse_unused(config, changed_fields(config, default, smoke(default)))
    assert hasattr(sys.modules[f"training.configs.{recipe}"], "stages") == (recipe in STAGED)


def test_python_is_refused_what_differs():
    default = default_config("siclip")
    changed = replace(default, teacher_from="cache", drawn_views=replace(default.drawn_views, flip=0.25))
    assert changed_fields(changed, default) == {"teacher_from", "flip"}
    with pytest.raises(UserError, match=r"--flip 0\.25 would not be used with --teacher-from cache"):
        refuse_unused(changed, changed_fields(changed, default))
    assert [as_given("sync_bn", False), as_given("from_", ("a", "b"))] == ["--no-sync-bn", "--from a b"]
    assert as_given("sides", ()) == "--sides"
