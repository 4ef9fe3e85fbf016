"""What makes the optimizer steps of one adapter.

The loop divides every micro-batch's summed loss by the tokens of the whole optimizer step, over all
ranks; gradients are therefore *summed* over ranks, never averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

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
        """Add the gradients of a micro-batch; `last` if a step follows."""

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
        """Return the trained parameters, unsharded, on the main rank's CPU; every rank calls it, others get {}."""

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Set the trained parameters; every rank calls it."""

    def state(self) -> tuple[Weights, dict[str, Any]]:
        """Return optimizer tensors keyed `parameter|state`, and what fits JSON; as `weights` does."""

    def load_state(self, tensors: Mapping[str, torch.Tensor], rest: Mapping[str, Any]) -> None:
        """Take back what `state` returned; every rank calls it."""
