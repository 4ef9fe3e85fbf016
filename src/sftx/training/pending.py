"""Deferred read-back: a step's loss and gradient norm, on their way from a GPU to the host.

A GPU works through a queue that the host fills. Reading a step's loss at once would let the queue run dry; read after
the next step was launched, the loss is there already. On a CPU nothing is deferred.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sftx.data.batches.feed import Step
from sftx.parallel.engine import Engine
from sftx.signals import Signals


def read_back(*scalars: torch.Tensor) -> Callable[[], list[float]]:
    """Start copying scalars to the host; return a function that waits for this copy alone and returns them."""
    values = torch.stack([s.detach().double() for s in scalars])
    if values.device.type != "cuda":
        return values.tolist
    on_host = torch.empty(len(scalars), dtype=torch.float64, pin_memory=True)
    on_host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> list[float]:
        copied.synchronize()
        numbers: list[float] = on_host.tolist()
        return numbers

    return wait


class PendingStep:
    """An optimizer step that was launched, and whose summed loss and gradient norm were not read yet."""

    def __init__(
        self, step: Step, number: int, learning_rate: float, loss_sum: torch.Tensor, grad_norm: torch.Tensor
    ) -> None:
        self.step, self.number, self.learning_rate = step, number, learning_rate
        self._read = read_back(loss_sum, grad_norm)

    def loss_and_norm(self) -> tuple[float, float]:
        """Return the summed loss and the norm, waiting for the device if it has not got that far."""
        loss_sum, grad_norm = self._read()
        return loss_sum, grad_norm


class StopVote:
    """Decides between the micro-batches of one step whether the run stops.

    A rank of a replicated model may stop by itself: the others learn of it in the sum at the end of the step. Ranks of
    a sharded engine compute every forward pass together, so all must stop before the same micro-batch. They sum their
    requests at each boundary and read the sum at the next one, by when a GPU has computed it.
    """

    def __init__(self, engine: Engine, signals: Signals, micro_batches: int) -> None:
        self._engine, self._signals, self._last = engine, signals, micro_batches - 1
        self._pending: Callable[[], list[float]] | None = None

    def before(self, micro_batch: int) -> bool:
        """Return True if the step ends before this micro-batch; every rank of a sharded engine calls it."""
        requested = self._signals.received is not None
        if not self._engine.sharded:
            return requested
        if self._pending is not None and self._pending()[0] > 0:
            return True
        if micro_batch < self._last:
            flag = torch.full((), float(requested), dtype=torch.float64, device=self._engine.device)
            self._pending = read_back(self._engine.sum(flag))
        else:
            self._pending = None
        return False
