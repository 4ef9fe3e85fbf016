"""What a step came to, on its way from the device to the host.

A GPU works through what it was given while the host prepares more. Asking it for a step's loss at once would let it
run dry; asked for after the next step was given to it, the answer is there already.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sftx.data.feed import Step
from sftx.parallel.engine import Engine
from sftx.parallel.signals import Signals


class Reading:
    """Scalars that are being copied to the host; asking for them waits for nothing that was begun later."""

    def __init__(self, *scalars: torch.Tensor) -> None:
        self._values = torch.stack([s.detach().double() for s in scalars])
        self._there: torch.cuda.Event | None = None
        if self._values.device.type == "cuda":
            on_device, self._there = self._values, torch.cuda.Event()
            self._values = torch.empty(len(scalars), dtype=torch.float64, pin_memory=True)
            self._values.copy_(on_device, non_blocking=True)
            self._there.record()

    def numbers(self) -> list[float]:
        """Return the scalars."""
        if self._there is not None:
            self._there.synchronize()
        numbers: list[float] = self._values.tolist()
        return numbers


@dataclass(frozen=True)
class Launched:
    """A step that was given to the device; its summed loss and its gradient norm are read when they are needed."""

    step: Step
    number: int
    learning_rate: float
    outcome: Reading | tuple[float, float]

    def loss_and_norm(self) -> tuple[float, float]:
        """Return them, waiting for the device if it has not come so far."""
        loss, norm = self.outcome.numbers() if isinstance(self.outcome, Reading) else self.outcome
        return loss, norm


class StopVote:
    """Decides between the micro-batches of one step whether the run was asked to stop.

    A rank of a replicated model may stop by itself: ranks meet at the end of the step, and learn of it there. Ranks of
    a sharded engine meet in every forward pass, so all must stop before the same micro-batch. They sum their requests
    at each boundary and read the sum at the next one, where a GPU has it without being waited for.
    """

    def __init__(self, engine: Engine, signals: Signals, micro_batches: int) -> None:
        self._engine, self._signals, self._last = engine, signals, micro_batches - 1
        self._pending: Reading | None = None

    def before(self, micro_batch: int) -> bool:
        """Return True if the step ends before this micro-batch; every rank of a sharded engine calls it."""
        asked = self._signals.received is not None
        if not self._engine.sharded:
            return asked
        if self._pending is not None and self._pending.numbers()[0] > 0:
            return True
        if micro_batch < self._last:
            flag = torch.full((), float(asked), dtype=torch.float64, device=self._engine.device)
            self._pending = Reading(self._engine.sum(flag))
        else:
            self._pending = None
        return False
