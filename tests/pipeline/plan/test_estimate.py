"""Hours, bytes and operations of stages, against the arithmetic written out."""

from dataclasses import replace

import pytest

from pipeline.plan.costs import CLAIM, FILE_OPERATIONS, FLOP, STUDENTS, Costs
from pipeline.plan.estimate import Choices, Corpus, Gpu, Hardware, StageCost, gpu_jobs, stage_costs
from pipeline.plan.rates import MeasuredRates

CORPUS = Corpus("small", 1_200, 1_000, 100, ingest_tasks=2, pack_tasks=1, gpu_tasks=4)
RATES = MeasuredRates("H100", "2026-11-26", "2.11", 8e14, {"image, ViT-L/14": 2400.0, "step of ViT-B-16": 1000.0})
ASSUMED = Gpu(peak=8e14, sustained=2e14)
MEASURED = replace(ASSUMED, measured=RATES)


def by_name(choices: Choices | None = None) -> dict[str, StageCost]:
    return {stage.name: stage for stage in stage_costs(CORPUS, choices or Choices(), cores=16)}


def test_every_job_has_operations_and_every_student_a_step():
    jobs = {job for stage in gpu_jobs(Choices()).values() for job in stage}
    assert jobs == set(FLOP)
    assert {f"train {name}" for name in STUDENTS} <= set(by_name())


def test_on_the_measured_card_a_job_takes_what_it_took():
    assert MEASURED.seconds({"image, ViT-L/14": 24_000}) == pytest.approx(10)
    assert MEASURED.seconds({"step of ViT-B-16": 24_000}) == pytest.approx(24)


def test_another_card_keeps_up_the_same_share():
    half = replace(MEASURED, peak=4e14)
    assert half.seconds({"image, ViT-L/14": 24_000}) == pytest.approx(20)


def test_jobs_without_a_rate_take_the_assumed_one():
    for gpu in (ASSUMED, MEASURED):
        assert gpu.seconds({"text, ViT-L/14": 1e6}) == pytest.approx(1e6 * 13.3e9 / 2e14)
    both = {"image, ViT-L/14": 24_000, "text, ViT-L/14": 1e6}
    assert MEASURED.seconds(both) == pytest.approx(10 + 1e6 * 13.3e9 / 2e14)
    assert ASSUMED.seconds({}) == 0


def test_what_figures_rest_on():
    stages = by_name()
    assert MEASURED.basis(stages["train ViT-B-16"].jobs) == "measured"
    assert MEASURED.basis(stages["cache"].jobs) == "partly measured"
    assert MEASURED.basis(stages["caption"].jobs) == "assumed"
    assert MEASURED.basis(stages["ingest"].jobs) == "assumed"
    assert ASSUMED.basis(stages["train ViT-B-16"].jobs) == "assumed"


def test_the_clock_is_set_by_the_slowest():
    cache = by_name()["cache"]
    seconds = 1_000 * (10 * 162.03e9 + 6 * 13.3e9) / 2e14 / 4
    assert cache.hours(Hardware(ASSUMED)) == (pytest.approx(seconds / 3600), "GPU")
    assert cache.hours(Hardware(replace(ASSUMED, sustained=1e18))) == (
        pytest.approx(1_000 * 10 * Costs().view_ms / 1e3 / 16 / 4 / 3600),
        "cores",
    )
    ingest = by_name()["ingest"]
    assert ingest.hours(Hardware(ASSUMED, gbit=0.001)) == (pytest.approx(125e6 / 125e3 / 3600), "network")


def test_views_captions_and_epochs_count():
    few = by_name(Choices(views=2, captions=1, int8=True, epochs=3))
    assert few["cache"].jobs == {"image, ViT-L/14": 2_000, "text, ViT-L/14": 2_000}
    assert few["cache"].written == 1_000 * (4 * (768 + 4) + 90)
    assert few["caption"].jobs["five captions of 30 tokens, CoCa ViT-L/14"] == pytest.approx(200)
    once = by_name()["train ViT-M-32"]
    assert few["train ViT-M-32"].core_hours == pytest.approx(3 * once.core_hours)
    assert few["train ViT-M-32"].peta_hours == pytest.approx(3 * 1_000 * 29.85e9 / 1e15 / 3600)


def test_an_array_claims_its_shards():
    stages = by_name()
    assert stages["pack"].file_operations(12) == 12 * FILE_OPERATIONS["pack"]  # one task
    assert stages["caption"].file_operations(12) == 12 * (FILE_OPERATIONS["caption"] + CLAIM)
    assert stages["train ViT-M-32"].file_operations(12) == 0


def test_a_cache_of_narrower_vectors_is_smaller():
    costs = Costs()
    wide, narrow = Choices(views=4, captions=0), Choices(views=4, captions=0, width=512)
    assert wide.cached_bytes(costs) == 5 * 2 * 768 + costs.row_more
    assert narrow.cached_bytes(costs) == 5 * 2 * 512 + costs.row_more
    read = {width: by_name(Choices(width=width))["train ViT-M-32"].read for width in (512, 768)}
    assert read[768] - read[512] == 1_000 * 2 * 2 * 256
