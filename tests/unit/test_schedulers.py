"""Each schedule against its formula at points worked out by hand."""

from __future__ import annotations

import math

import pytest

from sftx import PROJECT_ROOT
from sftx.config.checks.check import freeze
from sftx.config.composition.prepare import compose_checked, options
from sftx.training import schedulers as s
from sftx.training.plot_schedules import svg

CASES = [
    (s.Constant(), {0: 1, 50: 1, 99: 1}),
    (s.ConstantWithWarmup(10), {0: 0.1, 4: 0.5, 9: 1, 10: 1, 99: 1}),
    (s.ConstantWithWarmup(0.1), {0: 0.1, 9: 1, 99: 1}),
    (s.Step(0, every=25, factor=0.5), {0: 1, 24: 1, 25: 0.5, 50: 0.25, 99: 0.125}),
    (s.Step(20, every=0.5, factor=0.1), {19: 1, 20: 1, 59: 1, 60: 0.1, 99: 0.1}),
    (s.Exponential(0, final=0.01), {0: 1, 50: 0.1, 100: 0.01}),
    (s.Cosine(0), {0: 1, 50: 0.5, 25: (1 + math.sqrt(0.5)) / 2, 100: 0}),
    (s.Cosine(20, floor=0.1), {19: 1, 20: 1, 60: 0.55, 100: 0.1}),
    (s.CosineWithRestarts(0, cycles=2), {0: 1, 25: 0.5, 50: 1, 75: 0.5, 100: 0}),
    (s.Polynomial(0, power=1), {0: 1, 30: 0.7, 100: 0}),
    (s.Polynomial(0, power=2), {0: 1, 50: 0.25, 100: 0}),
    (s.Cyclic(0, cycles=2, floor=0.1), {0: 1, 25: 0.1, 50: 1, 75: 0.1}),
    (s.InverseSqrt(16), {15: 1, 16: 1, 64: 0.5}),
    (s.InverseSqrt(0, timescale=10), {0: 1, 30: 0.5}),
    (s.WarmupStableDecay(10, decay=0.5), {0: 0.1, 10: 1, 54: 1, 55: 1, 100: 0}),
]


@pytest.mark.parametrize(
    ("schedule", "points"), CASES, ids=lambda c: type(c).__name__ if isinstance(c, s.Schedule) else ""
)
def test_factor(schedule: s.Schedule, points: dict[int, float]) -> None:
    for step, factor in points.items():
        assert schedule.at(step, 100) == pytest.approx(factor, abs=1e-9), step


def test_reduce_on_plateau() -> None:
    schedule = s.ReduceOnPlateau(0, factor=0.5, patience=1, min_delta=0.1, floor=0.3)
    for loss, expected in [(5.0, 1), (4.0, 1), (3.95, 1), (3.96, 0.5), (3.9, 0.5), (3.9, 0.3), (1.0, 0.3)]:
        schedule.observe(loss)
        assert schedule.at(0, 100) == pytest.approx(expected), loss
    other = s.ReduceOnPlateau(0, factor=0.5, patience=1, min_delta=0.1, floor=0.3)
    other.restore(schedule.state())
    assert other.at(5, 10) == schedule.at(5, 10)


@pytest.mark.parametrize("option", options("scheduler"))
def test_every_option_has_warmup_but_constant(option: str) -> None:
    from sftx.build import build

    schedule = build(freeze(compose_checked([f"scheduler={option}", "warmup_steps=10"])).scheduler)
    rates = [schedule.at(step, 100) for step in range(100)]
    assert all(0 <= r <= 1 for r in rates)
    if option == "constant":
        assert rates == [1.0] * 100
    else:
        assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])


def test_the_picture_in_the_docs_is_current() -> None:
    written = (PROJECT_ROOT / "docs/schedules.svg").read_text(encoding="utf-8")
    assert written == svg(), "run: make docs"
