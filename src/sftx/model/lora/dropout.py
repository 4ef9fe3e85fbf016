"""Dropout whose mask is a pure function of (seed, step, micro-batch, layer).

A mask drawn from the global generator depends on everything drawn before it, so recomputation,
resuming and training several adapters together would each change the run. This one cannot.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import ref

import torch
from torch import nn

from sftx.seeds import key_of

LEVELS = 2**16
"""Of a drop probability."""


@dataclass
class Clock:
    """Where an adapter's training stands; its dropout layers read it."""

    seed: int
    step: int = 0
    micro_batch: int = 0


class KeyedDropout(nn.Module):
    """Inverted dropout with probability `p`, keyed by an adapter's clock and the layer's number.

    A value is kept where 16 random bits say so: four values are decided by one number that the generator
    draws, at a sixth of the cost of `bernoulli_` on a CPU; `p` is rounded to 1/65536.
    """

    def __init__(self, p: float, clock: Clock, layer: int) -> None:
        super().__init__()
        self.p, self.clock, self.layer = p, clock, layer
        self._handle = torch.tensor(len(_LAYERS))
        _LAYERS.append(ref(self))

    @property
    def drops(self) -> bool:
        """Return True if anything is dropped now."""
        return self.training and self.p > 0.0

    def keep(self, x: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Return 1 (keep) or 0 for each value of `x`, int8, and the probability of 1."""
        dropped = min(round(self.p * LEVELS), LEVELS - 1)
        mask = _traced_mask(x, self._handle) if torch.compiler.is_compiling() else self.mask(x)
        return mask, 1 - dropped / LEVELS

    def mask(self, x: torch.Tensor) -> torch.Tensor:
        """Return 1 (keep) or 0 for each value of `x`, int8."""
        generator = torch.Generator(device=x.device)
        generator.manual_seed(key_of(self.clock.seed, self.clock.step, self.clock.micro_batch, self.layer))
        drawn = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device)
        drawn.random_(-(2**63), None, generator=generator)
        bits = drawn.view(torch.int16)[: x.numel()].view(x.shape)
        dropped = min(round(self.p * LEVELS), LEVELS - 1)
        keep = torch.empty(x.shape, dtype=torch.int8, device=x.device)
        return torch.ge(bits, dropped - LEVELS // 2, out=keep)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Drop entries of `x` in training; of any shape."""
        if not self.drops:
            return x
        keep, kept = self.keep(x)
        return x * keep / kept

    def extra_repr(self) -> str:
        """Show the probability when printed."""
        return f"p={self.p}"


_LAYERS: list[ref[KeyedDropout]] = []
"""All layers, by handle. Compiled code takes a handle as a tensor, so that it is the same for every layer and step:
torch.compile would treat the numbers themselves as constants."""


@torch.library.custom_op("sftx::keyed_mask", mutates_args=())
def _traced_mask(x: torch.Tensor, handle: torch.Tensor) -> torch.Tensor:
    """Return a layer's mask for `x`; torch.compile does not look into it."""
    layer = _LAYERS[int(handle)]()
    assert layer is not None, "it is being called"
    return layer.mask(x)


@_traced_mask.register_fake
def _(x: torch.Tensor, handle: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=torch.int8, device=x.device)
