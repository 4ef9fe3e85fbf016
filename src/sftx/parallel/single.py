"""One process, one device; group `parallel`, option `single`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from sftx.parallel.engine import Stepper
from sftx.parallel.replicated import ReplicatedStepper

if TYPE_CHECKING:
    from sftx.model.adapt import AdaptedModel, Adapter


class SingleEngine:
    """The engine of a run with one rank: nothing to exchange."""

    rank = 0
    world_size = 1
    is_main = True
    sharded = False

    def __init__(self, device: torch.device, remarks: Sequence[str] = ()) -> None:
        self.device, self.remarks = device, remarks

    @property
    def defers_loss(self) -> bool:
        """True on a GPU: a CPU does one thing after the other anyway."""
        return self.device.type == "cuda"

    def loading(self, dtype: torch.dtype) -> AbstractContextManager[object]:
        """Return a context that changes nothing."""
        return nullcontext()

    def shard(self, model: AdaptedModel) -> None:
        """Do nothing: every rank holds the whole model."""

    def stepper(
        self, model: AdaptedModel, adapter: Adapter, optimizer: Optimizer, dtype: torch.dtype, max_grad_norm: float
    ) -> Stepper:
        """Return the stepper of whole parameters; there is nothing to sum."""
        return ReplicatedStepper(adapter.parameters, optimizer, dtype, max_grad_norm)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor."""
        return tensor

    def from_main(self, value: Any) -> Any:
        """Return the value."""
        return value

    def barrier(self) -> None:
        """Do nothing."""

    def close(self, *, together: bool) -> None:
        """Do nothing."""
