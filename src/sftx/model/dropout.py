"""Dropout whose mask is a pure function of (seed, step, micro-batch, layer).

A mask drawn from the global generator depends on everything drawn before it, so recomputation,
resuming and training several adapters together would each change the run. This one cannot.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

import torch
from torch import nn

LEVELS = 2**16
"""Of a drop probability."""


def key_of(*numbers: int) -> int:
    """Return a 63-bit seed that depends on each number and on their order."""
    packed = struct.pack(f"<{len(numbers)}q", *numbers)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


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

    @property
    def drops(self) -> bool:
        """Tell whether anything is dropped now."""
        return self.training and self.p > 0.0

    def keep(self, x: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Return 1 (keep) or 0 for each value of `x`, int8, and the probability of 1."""
        generator = torch.Generator(device=x.device)
        generator.manual_seed(key_of(self.clock.seed, self.clock.step, self.clock.micro_batch, self.layer))
        drawn = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device)
        drawn.random_(-(2**63), None, generator=generator)
        bits = drawn.view(torch.int16)[: x.numel()].view(x.shape)
        dropped = min(round(self.p * LEVELS), LEVELS - 1)
        keep = torch.empty(x.shape, dtype=torch.int8, device=x.device)
        return torch.ge(bits, dropped - LEVELS // 2, out=keep), 1 - dropped / LEVELS

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Drop entries of `x` in training; of any shape."""
        if not self.drops:
            return x
        keep, kept = self.keep(x)
        return x * keep / kept

    def extra_repr(self) -> str:
        """Show the probability when printed."""
        return f"p={self.p}"
