"""A component of a user's own: fp16 with a loss scaler, as on a GPU, wherever the run is."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sftx.effective import Effective
from sftx.training.precision import Numerics, Precision


@dataclass(frozen=True)
class Half(Precision):
    """Resolves to fp16 on a CPU too."""

    def resolve(self, device: torch.device, effective: Effective, *, sharded: bool) -> Numerics:
        return Numerics(torch.float16, device, sharded)
