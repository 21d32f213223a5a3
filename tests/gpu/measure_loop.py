"""What the training loop's own means bring, each as a ratio of two steps that take turns in one run.

Batches that are copied ahead on a stream of their own, fused AdamW, torch.compile, and frozen weights in
bf16.
"""

import copy
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import chain

import torch
from figures import Options, figure, options, run_parts, synchronize
from measure_train import Job, affinity_job, prepare_step, siclip_job

from training.data.batches import load_batches
from training.engine.frozen_weights import halve_frozen_weights
from training.engine.memory_estimate import bytes_of
from training.engine.optim import build_optimizer

TURNS = 3
STEPS = 4  # of a turn
WORKERS = 8

Step = Callable[[], None]


def seconds_by_turns(where: Options, *steps: Step) -> list[float]:
    """Median seconds of each kind of step, whose turns alternate after one step of each that does not count."""
    turns, number = (1, 1) if where.dry else (TURNS, STEPS)
    taken: list[list[float]] = [[] for _ in steps]
    for step in steps:
        step()
    for _ in range(turns):
        for step, own in zip(steps, taken, strict=True):
            synchronize(where.device)
            start = time.perf_counter()
            for _ in range(number):
                step()
            synchronize(where.device)
            own.append((time.perf_counter() - start) / number)
    return [statistics.median(own) for own in taken]


def report(name: str, plain: float, better: float, **facts: float | str) -> None:
    """Report how many times faster a step is, and the milliseconds of both."""
    figure(f"loop: {name}", plain / better, "x", **{"ms before": 1e3 * plain, "ms after": 1e3 * better}, **facts)


def measure_prefetch(where: Options) -> None:
    """Report a step whose batch was copied while the one before it was computed."""
    job = affinity_job(where)
    updater, _ = prepare_step(job, where, job.config.run)
    numbers = iter(range(10**6))

    def reading(prefetch: bool) -> Step:
        positions = job.rows.plan.positions(0, 0, 10**6)
        workers = 0 if where.dry else WORKERS
        batches = load_batches(job.rows, positions, workers=workers, device=where.device, prefetch=prefetch)

        def step() -> None:
            batch = next(batches)
            updater.update(batch, next(numbers), [len(batch["keys"])])

        return step

    report("ViT-M-32, batches copied ahead", *seconds_by_turns(where, reading(False), reading(True)))


def measure_optimizer(where: Options) -> None:
    """Report a step with fused AdamW against one with torch's loop over lists of tensors."""
    job = affinity_job(where)
    updater, step = prepare_step(job, where, job.config.run)
    fused = updater.optimizer
    plain = build_optimizer(job.task, job.config.optim, updater.groups, fused=False)

    def with_optimizer(optimizer: torch.optim.AdamW) -> None:
        updater.optimizer = optimizer
        step()

    taken = seconds_by_turns(where, partial(with_optimizer, plain), partial(with_optimizer, fused))
    report("ViT-M-32, fused AdamW", *taken)


def measure_frozen(where: Options) -> None:
    """Report SiCLIP's step with its frozen weights, and its teacher's, in bf16 against fp32."""
    job = siclip_job(where)
    halved = Job(job.name, job.config, job.student, copy.deepcopy(job.task), job.rows)
    halve_frozen_weights(halved.task, job.config.run.precision)
    steps = [prepare_step(one, where, one.config.run)[1] for one in (job, halved)]
    megabytes = [_weight_bytes(one) / 1e6 for one in (job, halved)]
    facts = {"MB of weights before": megabytes[0], "MB of weights after": megabytes[1]}
    report("SiCLIP-S0, frozen weights in bf16", *seconds_by_turns(where, *steps), **facts)


def _weight_bytes(job: Job) -> int:
    """Bytes of a job's weights on its device, those of its teachers too."""
    of_teachers = chain.from_iterable(teacher.tensors() for teacher in job.task.teachers)
    return bytes_of([*job.task.parameters(), *job.task.buffers(), *of_teachers])


def measure_compile(where: Options) -> None:
    """Report the TinyCLIP recipe's step compiled against eager, from which `--compile auto` takes its gain."""
    if where.dry:
        torch.compiler.set_stance("force_eager")  # a compiler needs longer than the rest together
    job = affinity_job(where)
    compiled = Job(job.name, job.config, job.student, copy.deepcopy(job.task), job.rows, batches=job.batches)
    _, eager_step = prepare_step(job, where, job.config.run)
    _, step = prepare_step(compiled, where, job.with_run(compile="on"))
    start = time.perf_counter()
    step()
    synchronize(where.device)
    first = time.perf_counter() - start
    facts: dict[str, float | str] = {"model": job.name, "first step s": first}
    report("tinyclip, compile over eager", *seconds_by_turns(where, eager_step, step), **facts)


def main() -> int:
    """Measure and report."""
    where = options(__doc__)
    parts = (measure_prefetch, measure_optimizer, measure_compile, measure_frozen)
    return run_parts(*(partial(part, where) for part in parts))


if __name__ == "__main__":
    sys.exit(main())
