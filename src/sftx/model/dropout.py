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
    """Inverted dropout with probability `p`, keyed by an adapter's clock and the layer's number."""

    def __init__(self, p: float, clock: Clock, layer: int) -> None:
        super().__init__()
        self.p, self.clock, self.layer = p, clock, layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Drop entries of `x` in training; of any shape."""
        if not self.training or self.p == 0.0:
            return x
        generator = torch.Generator(device=x.device)
        generator.manual_seed(key_of(self.clock.seed, self.clock.step, self.clock.micro_batch, self.layer))
        keep = torch.empty_like(x).bernoulli_(1.0 - self.p, generator=generator)
        return x * keep.div_(1.0 - self.p)

    def extra_repr(self) -> str:
        """Show the probability when printed."""
        return f"p={self.p}"
