"""The small interface between the loop and the machines it runs on.

The loop divides every micro-batch's summed loss by the tokens of the whole optimizer step, over all
ranks; an engine therefore *sums* gradients over ranks, and never averages.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch


class Engine(Protocol):
    """One rank of a run."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the rank that writes files."""

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a scalar loss."""

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sum the gradients of parameters over ranks, in place."""

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor summed over ranks."""

    def from_main(self, value: Any) -> Any:
        """Return the main rank's value of a plain Python object."""

    def barrier(self) -> None:
        """Wait for all ranks."""

    def close(self) -> None:
        """End the process group, if there is one."""


def choose_device(asked: str, local_rank: int) -> torch.device:
    """Return the device of a rank: `auto` takes a GPU when there is one.

    Errors:
        ConfigError: a GPU was asked for and there is none.
    """
    from sftx.errors import ConfigError

    if asked == "cuda" and not torch.cuda.is_available():
        raise ConfigError("`device=cuda`: torch sees no GPU here. Use device=auto, or install torch's CUDA build.")
    if asked == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank)
