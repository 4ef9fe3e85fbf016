"""On a GPU, chains of small operations that one kernel does: SwiGLU and rotation, Liger's where it is installed.

Each pass over a tensor there costs more than its arithmetic. Both are tried on random values first, and compared with
what they stand for.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sftx.model.compare import differ, reason_of
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
    gate, up, grad = (torch.randn(3, width, device=device, dtype=dtype, generator=generator) for _ in range(3))
    results = []
    for function in (_silu_times, lambda g, u: F.silu(g) * u):
        leaves = gate.clone().requires_grad_(), up.clone().requires_grad_()
        out = function(leaves[0] * 1, leaves[1] * 1)
        results.append((out.detach().clone(), *torch.autograd.grad(out, leaves, grad)))
    if reason := differ(results[0], results[1], dtype):
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
    """Replace the function of the architecture's file that rotates queries and keys, for tensors on a GPU."""
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    attention: Any = next((m for m in model.modules() if hasattr(m, "q_proj") and hasattr(m, "k_proj")), None)
    file = sys.modules.get(type(attention).__module__)
    original = getattr(file, "apply_rotary_pos_emb", None)
    if original is None:
        return "the model has no rotation of this form"
    if getattr(original, "by_liger", False):
        return None

    def rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *a: Any, **named: Any) -> Any:
        """Rotate queries and keys by their positions (arXiv:2104.09864)."""
        if a or named or not q.is_cuda:
            return original(q, k, cos, sin, *a, **named)
        return liger_rotary_pos_emb(q, k, cos, sin)

    generator = torch.Generator(device).manual_seed(0)
    config: Any = model.config
    config = config.get_text_config()
    heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads[0]
    angles = torch.rand(1, 5, width // 2, device=device, generator=generator).repeat(1, 1, 2)
    tensors = [torch.randn(1, 5, n, width, device=device, dtype=dtype, generator=generator) for n in heads]
    results = []
    for function in (rotate, original):
        leaves = [t.clone().requires_grad_() for t in tensors]
        q, k = (t.view(1, 5, -1, width).transpose(1, 2) for t in (t * 1 for t in leaves))
        out = function(q, k, angles.cos().to(dtype), angles.sin().to(dtype))
        loss = sum((o.float() * (i + 1)).sum() for i, o in enumerate(out))
        results.append((*(o.detach().clone() for o in out), *torch.autograd.grad(loss, leaves)))
    if reason := differ(results[0], results[1], dtype):
        return reason
    rotate.by_liger = True  # type: ignore[attr-defined]
    file.apply_rotary_pos_emb = rotate  # type: ignore[union-attr]
    return None
