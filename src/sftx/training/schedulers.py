"""Learning-rate schedules: pure functions of the step; group `scheduler`.

A schedule returns the factor that multiplies `learning_rate` at an optimizer step (counted from 0)
of a run of `total` steps. Warm-up rises linearly and reaches 1 at its last step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any

from sftx.config.bounds import Bounds


def warmup_length(warmup_steps: int | float, total: int) -> int:
    """Return the warm-up in steps: a number below 1 is a share of all steps."""
    return math.ceil(warmup_steps * total) if 0 < warmup_steps < 1 else int(warmup_steps)


@dataclass
class Schedule:
    """Base of all schedules: `shape` is what follows the warm-up."""

    warmup_steps: Annotated[int | float, Bounds(at_least=0)] = 0

    def at(self, step: int, total: int) -> float:
        """Return the factor of `learning_rate` at `step`."""
        warmup = warmup_length(self.warmup_steps, total)
        if step < warmup:
            return (step + 1) / warmup
        return self.shape(step - warmup, max(1, total - warmup))

    def shape(self, step: int, total: int) -> float:
        """Return the factor at `step` of the `total` steps after warm-up."""
        return 1.0

    def observe(self, eval_loss: float) -> None:
        """Learn of an evaluation; only `ReduceOnPlateau` cares."""

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must keep."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what `state` returned."""


def _above(floor: float, factor: float) -> float:
    return floor + (1.0 - floor) * factor


@dataclass
class Constant(Schedule):
    """A constant lr, without warm-up."""

    warmup_steps: int | float = field(init=False, default=0)


@dataclass
class ConstantWithWarmup(Schedule):
    """A constant lr after the warm-up."""


@dataclass
class Step(Schedule):
    """Times `factor` at regular intervals (`every`: steps, or a share of the steps after warm-up)."""

    every: Annotated[int | float, Bounds(above=0)] = 0.3
    factor: Annotated[float, Bounds(above=0, at_most=1)] = 0.5

    def shape(self, step: int, total: int) -> float:
        """Return the factor after the intervals that have passed."""
        interval = max(1, round(self.every * total) if self.every < 1 else int(self.every))
        return self.factor ** (step // interval)


@dataclass
class Exponential(Schedule):
    """The lr falls by the same share each step, to `final` of its start at the end."""

    final: Annotated[float, Bounds(above=0, at_most=1)] = 0.01

    def shape(self, step: int, total: int) -> float:
        """Return `final` to the share of the way."""
        return self.final ** (step / total)


@dataclass
class Cosine(Schedule):
    """Half a cosine from 1 to `floor` (arXiv:1608.03983, without restarts)."""

    floor: Annotated[float, Bounds(at_least=0, at_most=1)] = 0.0

    def shape(self, step: int, total: int) -> float:
        """Return the cosine at the share of the way."""
        return _above(self.floor, 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / total))))


@dataclass
class CosineWithRestarts(Schedule):
    """`cycles` equal half-cosines, each starting at 1 again (arXiv:1608.03983)."""

    cycles: Annotated[int, Bounds(at_least=1)] = 3
    floor: Annotated[float, Bounds(at_least=0, at_most=1)] = 0.0

    def shape(self, step: int, total: int) -> float:
        """Return the cosine at the share of the present cycle."""
        if step >= total:
            return self.floor
        return _above(self.floor, 0.5 * (1.0 + math.cos(math.pi * ((step * self.cycles / total) % 1.0))))


@dataclass
class Polynomial(Schedule):
    """The remaining share of the steps to the `power`: 1 is linear decay."""

    power: Annotated[float, Bounds(above=0)] = 1.0
    floor: Annotated[float, Bounds(at_least=0, at_most=1)] = 0.0

    def shape(self, step: int, total: int) -> float:
        """Return the power of the remaining share."""
        return _above(self.floor, max(0.0, 1.0 - step / total) ** self.power)


@dataclass
class Cyclic(Schedule):
    """Triangles between 1 and `floor`, `cycles` of them, starting and ending at 1 (arXiv:1506.01186)."""

    cycles: Annotated[int, Bounds(at_least=1)] = 4
    floor: Annotated[float, Bounds(at_least=0, at_most=1)] = 0.1

    def shape(self, step: int, total: int) -> float:
        """Return the triangle's height at the share of the present cycle."""
        return _above(self.floor, abs(1.0 - 2.0 * ((step * self.cycles / total) % 1.0)))


@dataclass
class InverseSqrt(Schedule):
    """Falls as one over the square root of the step (arXiv:1706.03762); `timescale` defaults to the warm-up."""

    timescale: Annotated[int | None, Bounds(at_least=1)] = None

    def at(self, step: int, total: int) -> float:
        """Return the factor; the warm-up's length sets the scale of the fall."""
        warmup = warmup_length(self.warmup_steps, total)
        if step < warmup:
            return (step + 1) / warmup
        scale = self.timescale or max(1, warmup)
        return math.sqrt(scale / (scale + step - warmup))


@dataclass
class WarmupStableDecay(Schedule):
    """Constant, then the last `decay` of the run falls linearly to `floor` (arXiv:2404.06395)."""

    decay: Annotated[float, Bounds(above=0, at_most=1)] = 0.2
    floor: Annotated[float, Bounds(at_least=0, at_most=1)] = 0.0

    def shape(self, step: int, total: int) -> float:
        """Return 1 until the decay begins."""
        length = max(1, round(self.decay * total))
        return _above(self.floor, min(1.0, max(0.0, (total - step) / length)))


@dataclass
class ReduceOnPlateau(Schedule):
    """Times `factor` when the eval loss has not fallen by `min_delta` for `patience` evaluations, down to `floor`."""

    factor: Annotated[float, Bounds(above=0, at_most=1)] = 0.5
    patience: Annotated[int, Bounds(at_least=0)] = 2
    min_delta: Annotated[float, Bounds(at_least=0)] = 0.0
    floor: Annotated[float, Bounds(at_least=0, at_most=1)] = 0.01
    current: float = field(init=False, default=1.0)
    best: float = field(init=False, default=math.inf)
    waited: int = field(init=False, default=0)

    def shape(self, step: int, total: int) -> float:
        """Return the factor that the evaluations so far have led to."""
        return self.current

    def observe(self, eval_loss: float) -> None:
        """Count evaluations without progress, and reduce when there were too many."""
        self.waited = 0 if eval_loss < self.best - self.min_delta else self.waited + 1
        self.best = min(self.best, eval_loss)
        if self.waited > self.patience:
            self.current = max(self.floor, self.current * self.factor)
            self.waited = 0

    def state(self) -> dict[str, Any]:
        """Return the factor, the best loss and the wait."""
        return {"current": self.current, "best": self.best, "waited": self.waited}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back the factor, the best loss and the wait."""
        self.current, self.best, self.waited = state["current"], state["best"], state["waited"]
