"""On a GPU, chains of small operations that one kernel does: SwiGLU and rotation, Liger's where it is installed.

Each pass over a tensor there costs more than its arithmetic. Both are tried on random values first: compared with what
they stand for, and timed beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sftx.model.compare import TIMED_ROWS, both_passes, differ, reason_of, slower
from sftx.model.rotation import use_rotation
from sftx.model.shortcuts import before

MISSING = "the package liger-kernel is not installed: pip install 'sftx[gpu]'"


def use_liger(model: nn.Module, device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
    """Let a model use the kernels that give the right thing here; return why each was not used, None: it was."""
    try:
        import liger_kernel.ops  # noqa: F401
    except ImportError:
        return dict.fromkeys(("SwiGLU", "rotation"), MISSING)
    return {
        "SwiGLU": reason_of(lambda: _use_swiglu(model, device, dtype)),
        "rotation": reason_of(lambda: _use_rotation(model, device, dtype)),
    }


class FusedMLP:
    """Put before the class of an MLP with a SiLU gate."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """Return `down(silu(gate(x)) * up(x))`."""
        return self.down_proj(_silu_times(self.gate_proj(x), self.up_proj(x)))


def _silu_times(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    if not gate.is_cuda:
        return F.silu(gate) * up
    from liger_kernel.ops import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)


def _use_swiglu(model: nn.Module, device: torch.device, dtype: torch.dtype) -> str | None:
    parts = {"gate_proj", "up_proj", "down_proj", "act_fn"}
    found: list[Any] = [m for m in model.modules() if {n for n, _ in m.named_children()} == parts and _is_silu(m)]
    if not found:
        return "the model has no MLP of this form"
    generator = torch.Generator(device).manual_seed(0)
    width = found[0].up_proj.out_features

    def tried(rows: int) -> list[Callable[[], tuple[torch.Tensor, ...]]]:
        gate, up = (torch.randn(rows, width, device=device, dtype=dtype, generator=generator) for _ in range(2))
        return [partial(both_passes, way, gate, up) for way in (_silu_times, lambda g, u: F.silu(g) * u)]

    short, long = tried(3)
    if reason := differ(short(), long(), dtype) or slower(tried(TIMED_ROWS), device):
        return reason
    x = torch.randn(1, 3, found[0].gate_proj.in_features, device=device, dtype=dtype, generator=generator)
    with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        wanted = found[0](x)
        if reason := differ((FusedMLP.forward(found[0], x),), (wanted,), dtype):
            return reason
    for module in found:
        kind: Any = type(module)
        module.__class__ = before(FusedMLP, kind)
    return None


def _is_silu(module: Any) -> bool:
    return type(module.act_fn).__name__ in ("SiLU", "SiLUActivation")


def _use_rotation(model: nn.Module, device: torch.device, dtype: torch.dtype) -> str | None:
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    return use_rotation(model, device, dtype, liger_rotary_pos_emb)
