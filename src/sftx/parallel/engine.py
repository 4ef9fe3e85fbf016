"""The small interface between the loop and the machines it runs on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from sftx.errors import SftxError
from sftx.parallel.stepper import Stepper

if TYPE_CHECKING:
    from sftx.model.adapt import AdaptedModel, Adapter


class Engine:
    """One rank of a run; this base class is the only rank, with nothing to exchange."""

    rank = 0
    world_size = 1
    sharded = False
    """Parameters are split over ranks: all ranks must run every forward pass together, and an
    optimizer keeps fp32 copies of half-precision parameters."""

    def __init__(self, device: torch.device, remarks: Sequence[str] = ()) -> None:
        self.device, self.remarks = device, remarks
        """`remarks`: what a user should know of how the ranks were set up."""

    @property
    def is_main(self) -> bool:
        """True on the rank that writes files."""
        return self.rank == 0

    @property
    def defers_loss(self) -> bool:
        """True where the host may launch a step before the loss of the last one was read: on one GPU."""
        return self.device.type == "cuda"

    def loading(self, dtype: torch.dtype) -> AbstractContextManager[object]:
        """Return the context in which a base is loaded that computes in `dtype`."""
        return nullcontext()

    def shard(self, model: AdaptedModel) -> None:
        """Split the parameters over ranks, if the engine does; once, with all adapters and before any optimizer."""

    def stepper(
        self, model: AdaptedModel, adapter: Adapter, optimizer: Optimizer, dtype: torch.dtype, max_grad_norm: float
    ) -> Stepper:
        """Return what makes an adapter's steps; `max_grad_norm` 0 is no clipping."""
        return Stepper(adapter.parameters, optimizer, dtype, max_grad_norm)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor summed over ranks."""
        return tensor

    def from_main(self, value: Any) -> Any:
        """Return the main rank's value of a plain Python object."""
        return value

    def barrier(self) -> None:
        """Wait for all ranks."""

    def close(self, *, together: bool) -> None:
        """End the process group, if there is one; without the other ranks if they may not do so."""


def on_main(engine: Engine, action: Callable[[], object]) -> None:
    """Do something on the main rank; what it raises for the user, every rank raises, and none waits for it."""
    problem: SftxError | None = None
    if engine.is_main:
        try:
            action()
        except SftxError as error:
            problem = error
    problem = engine.from_main(problem)
    if problem is not None:
        raise problem
