"""What a step came to, on its way from the device to the host.

A GPU works through what it was given while the host prepares more. Asking it for a step's loss at once would let it
run dry; asked for after the next step was given to it, the answer is there already.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sftx.data.feed import Step


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
