"""The small interface between the loop and the machines it runs on.

The loop divides every micro-batch's summed loss by the tokens of the whole optimizer step, over all
ranks; an engine therefore *sums* gradients over ranks, and never averages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.optim import Optimizer

if TYPE_CHECKING:
    from sftx.model.adapt import AdaptedModel, Adapter

Weights = dict[str, torch.Tensor]
Regularizer = Callable[[Mapping[str, torch.nn.Parameter]], None]
"""Adds to the gradients of parameters, which it is given by name."""


class Stepper(Protocol):
    """Makes the optimizer steps of one adapter, and knows what must be kept to go on after one.

    Optimizer, loss scaler and clipping belong to the adapter, not to the run.
    """

    regularizers: list[Regularizer]
    """Called at every step, after gradients were summed over ranks and before their norm is taken and clipped."""

    @property
    def scales_loss(self) -> bool:
        """True if an fp16 loss scaler is in use: it lowers its factor after a gradient that is not finite."""

    @property
    def loss_scale(self) -> float | None:
        """The factor that keeps fp16 gradients from vanishing; None without one."""

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add the gradients of a micro-batch; `last` tells that a step follows."""

    @property
    def masks(self) -> bool:
        """True when `apply` may be a flag on the device, which the host does not wait for."""

    def step(self, learning_rate: float, *, apply: bool | torch.Tensor = True) -> torch.Tensor:
        """Sum gradients over ranks, clip them, step; return their norm before clipping, a scalar.

        A gradient that is not finite changes nothing, and its norm is returned as it is; without `apply`
        none does, and the norm may be NaN.
        """

    def discard(self) -> None:
        """Forget the gradients that were added since the last step."""

    def weights(self) -> Weights:
        """Return the trained parameters, whole, on the main rank's CPU; every rank calls it, others get {}."""

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Set the trained parameters; every rank calls it."""

    def state(self) -> tuple[Weights, dict[str, Any]]:
        """Return optimizer tensors keyed `parameter|state`, and what fits JSON; as `weights` does."""

    def load_state(self, tensors: Mapping[str, torch.Tensor], rest: Mapping[str, Any]) -> None:
        """Take back what `state` returned; every rank calls it."""


class Engine(Protocol):
    """One rank of a run."""

    rank: int
    world_size: int
    device: torch.device
    sharded: bool
    """Parameters are split over ranks: all ranks must run every forward pass together, and an
    optimizer keeps fp32 copies of half-precision parameters."""
    remarks: Sequence[str]
    """What a user should know of how the ranks were set up."""

    @property
    def is_main(self) -> bool:
        """True on the rank that writes files."""

    @property
    def defers_loss(self) -> bool:
        """True where the host may launch a step before the loss of the last one was read."""

    def loading(self, dtype: torch.dtype) -> AbstractContextManager[object]:
        """Return the context in which a base is loaded that computes in `dtype`."""

    def shard(self, model: AdaptedModel) -> None:
        """Split the parameters over ranks, if the engine does; once, with all adapters and before any optimizer."""

    def stepper(
        self, model: AdaptedModel, adapter: Adapter, optimizer: Optimizer, dtype: torch.dtype, max_grad_norm: float
    ) -> Stepper:
        """Return what makes an adapter's steps; `max_grad_norm` 0 is no clipping."""

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor summed over ranks."""

    def from_main(self, value: Any) -> Any:
        """Return the main rank's value of a plain Python object."""

    def barrier(self) -> None:
        """Wait for all ranks."""

    def close(self, *, together: bool) -> None:
        """End the process group, if there is one; without the others when they may not come to that."""


def on_main(engine: Engine, action: Callable[[], object]) -> None:
    """Do something on the main rank; what it raises for the user, every rank raises, and none waits for it."""
    from sftx.errors import SftxError

    problem: SftxError | None = None
    if engine.is_main:
        try:
            action()
        except SftxError as error:
            problem = error
    problem = engine.from_main(problem)
    if problem is not None:
        raise problem
