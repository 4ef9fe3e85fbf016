"""One process, one device; group `parallel`, option `single`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from sftx.parallel.engine import Engine, choose_device


@dataclass(frozen=True)
class Single:
    """Trains alone."""

    def start(self, device: str) -> Engine:
        """Return the engine of the only rank."""
        return SingleEngine(choose_device(device, 0))


class SingleEngine:
    """The engine of a run with one rank: nothing to exchange."""

    rank = 0
    world_size = 1
    is_main = True

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a scalar loss."""
        loss.backward()

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Do nothing: the gradients are whole."""

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor."""
        return tensor

    def from_main(self, value: Any) -> Any:
        """Return the value."""
        return value

    def barrier(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""
