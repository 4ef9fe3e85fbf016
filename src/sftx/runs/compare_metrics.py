"""How the metrics of two runs differ, to the last bit; what measures speed is left out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sftx.runs.past import PastRun, Records

LOSSES = ("train/loss", "train/grad_norm", "eval/loss")
"""Are told first."""


@dataclass(frozen=True)
class Change:
    """A metric that has two values at a step."""

    metric: str
    step: int
    a: Any
    b: Any


@dataclass(frozen=True)
class Metric:
    """One metric of two runs: at how many steps each recorded it, and how far apart they are where both did."""

    name: str
    steps_a: int
    steps_b: int
    shared: int
    first: Change | None
    """Where it differs first, of the steps that both have."""
    largest: float
    """The largest difference."""
    largest_step: int | None

    @property
    def differs(self) -> bool:
        """True when any value differs, or one run has values that the other has not."""
        return self.first is not None or not self.steps_a == self.steps_b == self.shared


def is_speed(metric: str) -> bool:
    """True for what is measured in time, and never the same twice."""
    return metric.startswith("perf/") or metric.endswith("/seconds")


def compare_records(a: Records, b: Records) -> list[Metric]:
    """Compare metric by metric; the losses come first."""
    names = dict.fromkeys([*LOSSES, *_names(a), *_names(b)])
    found = (_metric(name, a, b) for name in names if not is_speed(name))
    return [metric for metric in found if metric.steps_a or metric.steps_b]


def _names(records: Records) -> Iterator[str]:
    for step in sorted(records):
        yield from records[step]


def _metric(name: str, a: Records, b: Records) -> Metric:
    one, other = ({step: r[name] for step, r in records.items() if name in r} for records in (a, b))
    shared = sorted(one.keys() & other.keys())
    changes = [Change(name, step, one[step], other[step]) for step in shared if not same(one[step], other[step])]
    largest = max(changes, key=distance, default=None)
    return Metric(
        name,
        len(one),
        len(other),
        len(shared),
        changes[0] if changes else None,
        distance(largest) if largest else 0.0,
        largest.step if largest else None,
    )


def same(a: Any, b: Any) -> bool:
    """True for the same bits: NaN is NaN, and 0.0 is not -0.0."""
    return repr(a) == repr(b)


def distance(change: Change) -> float:
    """Return how far the two values are apart; infinitely when one is no finite number."""
    values = (change.a, change.b)
    if not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
        return math.inf
    return abs(change.a - change.b)


def first_change(metrics: list[Metric]) -> Change | None:
    """Return where two runs differ first, of all steps that both have; of a step, the loss before what follows it."""
    return min((m.first for m in metrics if m.first), key=lambda change: change.step, default=None)


@dataclass(frozen=True)
class EvalLoss:
    """The evaluation loss of one run as (step, loss): the first, the best and the last."""

    first: tuple[int, float]
    best: tuple[int, float]
    last: tuple[int, float]


def eval_loss(run: PastRun) -> EvalLoss | None:
    """Return a run's eval losses, or None when it has none."""
    found = [(step, r["eval/loss"]) for step, r in sorted(run.records.items()) if "eval/loss" in r]
    known = [(step, float(loss)) for step, loss in found if isinstance(loss, int | float)]
    if not known:
        return None
    best = min(known, key=lambda pair: math.inf if math.isnan(pair[1]) else pair[1])
    return EvalLoss(known[0], best, known[-1])
