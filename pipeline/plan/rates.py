"""Rates of the jobs of a GPU, as a run of `tests/gpu/run.sh` measured them on one card and wrote them to a file.

The file is JSON: ``{"card": "NVIDIA H100 80GB HBM3", "date": "2026-11-26", "torch": "2.11.0+cu130", "ceiling": 7.9e14,
"rates": {"image, ViT-L/14": 2400.0}}``. ``ceiling`` is in operations per second, of a large bf16 product in that run.
The keys of ``rates`` are those of `costs.FLOP`, the values samples per second.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from pipeline.plan.costs import FLOP
from shards_spec.files import UserError
from shards_spec.library_errors import parse_json
from shards_spec.suggest import did_you_mean

RATES = Path(__file__).with_name("rates.json")  # what was measured last
FIX = "take the rates.json that `bash tests/gpu/run.sh` writes"


@dataclass(frozen=True)
class MeasuredRates:
    """Samples per second of jobs on one card, and that card's ceiling.

    Attributes:
        card: The card's name, as torch gives it.
        date: Of the run, YYYY-MM-DD.
        torch: Its version.
        ceiling: Operations per second of a large bf16 product.
        rates: Samples per second, by the keys of `FLOP`.
    """

    card: str
    date: str
    torch: str
    ceiling: float
    rates: Mapping[str, float] = field(default_factory=dict)

    def share(self, job: str) -> float | None:
        """The part of the ceiling that a job kept up, in (0, 1]; None where it was not measured."""
        return FLOP[job] * 1e9 * self.rates[job] / self.ceiling if job in self.rates else None


def read_rates(path: Path) -> MeasuredRates:
    """Read a file of rates.

    Raises UserError naming the file, the key and what to do when it is not there, is not JSON, lacks a field, has an
    unknown job, or a rate that is not positive or would need more than the ceiling.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {FIX}") from error
    if not data.strip():
        raise UserError(f"{path} is empty; {FIX}")
    content = parse_json(str(path), data, given=True, fix=FIX)
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object; {FIX}")
    jobs = content.get("rates")
    if not isinstance(jobs, dict):
        raise UserError(f"{path}: rates is not an object of samples per second by job; {FIX}")
    found = MeasuredRates(
        card=_text(path, content, "card"),
        date=_day(path, content),
        torch=_text(path, content, "torch"),
        ceiling=_positive(path, "ceiling", content.get("ceiling")),
        rates={job: _positive(path, f"rates: {job!r}", value) for job, value in jobs.items()},
    )
    for job in found.rates:
        _check_job(path, found, job)
    return found


def _check_job(path: Path, found: MeasuredRates, job: str) -> None:
    if job not in FLOP:
        raise UserError(f"{path}: rates: no job {job!r}; {did_you_mean(job, FLOP)}")
    share = found.share(job)
    assert share is not None
    if share > 1:
        raise UserError(
            f"{path}: rates: {job!r}: {found.rates[job]:g} samples/s would be {share:.3g} of the ceiling of "
            f"{found.ceiling:g} operations/s; give samples per second of that whole job and the ceiling of the same "
            "card and run"
        )


def _text(path: Path, content: dict[str, Any], key: str) -> str:
    value = content.get(key)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{path}: {key} is {value!r}, not a text; {FIX}")
    return value


def _day(path: Path, content: dict[str, Any]) -> str:
    text = _text(path, content, "date")
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError as error:
        raise UserError(f"{path}: date is {text!r}, not a day as 2026-11-26; {FIX}") from error


def _positive(path: Path, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        raise UserError(f"{path}: {key} is {value!r}, not a positive number; {FIX}")
    return float(value)
