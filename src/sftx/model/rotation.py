"""Rotary positions (arXiv:2104.09864) in three passes over queries and keys instead of an architecture's dozen.

Architectures of transformers call a function of their own file, `apply_rotary_pos_emb`. Another one takes its place
where, tried on random values, it gives the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from sftx.model.compare import TIMED_ROWS, both_passes, differ, reason_of, slower

NAME = "apply_rotary_pos_emb"
Rotate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Of queries and keys `[B, heads, T, D]`, cosines and sines `[B, T, D]`."""


def use_rotation(model: nn.Module, device: torch.device, dtype: torch.dtype, rotate: Rotate | None) -> str | None:
    """Let models of this architecture rotate by a function if it gives the right thing, None: by their own again.

    Return why it is not used.
    """
    attention: Any = next((m for m in model.modules() if hasattr(m, "q_proj") and hasattr(m, "k_proj")), None)
    file = sys.modules.get(type(attention).__module__)
    found = getattr(file, NAME, None)
    if found is None:
        return "the model has no rotation of this form"
    own = getattr(found, "own", found)
    if rotate is None:
        setattr(file, NAME, own)
        return None
    if reason := reason_of(lambda: _trouble(model, device, dtype, rotate, own, found)):
        return reason

    def chosen(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *a: Any, **named: Any) -> Any:
        """Rotate queries and keys by their positions."""
        whole = cos.ndim == 3 and cos.shape[-1] == q.shape[-1]
        if a or named or not whole or q.device.type != device.type:
            return own(q, k, cos, sin, *a, **named)
        return rotate(q, k, cos, sin)

    chosen.own, chosen.by = own, rotate  # type: ignore[attr-defined]
    setattr(file, NAME, chosen)
    return None


def _trouble(
    model: Any, device: torch.device, dtype: torch.dtype, rotate: Rotate, own: Rotate, found: Rotate
) -> str | None:
    """Compare a function with the architecture's own, and on a GPU time it beside the one that is there."""
    generator = torch.Generator(device).manual_seed(0)
    config = model.config.get_text_config()
    heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads[0]

    def tried(rows: int, *functions: Rotate) -> list[Callable[[], tuple[torch.Tensor, ...]]]:
        q, k = (torch.randn(1, rows, n, width, device=device, dtype=dtype, generator=generator) for n in heads)
        angles = torch.rand(1, rows, width // 2, device=device, generator=generator).repeat(1, 1, 2)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

        def of(function: Rotate) -> Callable[[], tuple[torch.Tensor, ...]]:
            return lambda: both_passes(lambda q, k: function(q.transpose(1, 2), k.transpose(1, 2), cos, sin), q, k)

        return list(map(of, functions))

    result, wanted = (function() for function in tried(5, rotate, own))
    return differ(result, wanted, dtype) or slower(tried(TIMED_ROWS, rotate, found), device)


def rotate_lean(
    q_BHTD: torch.Tensor, k_BKTD: torch.Tensor, cos_BTD: torch.Tensor, sin_BTD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys, each half of `D` with the other."""
    cos, sin = cos_BTD[:, None], sin_BTD[:, None]
    return _Rotation.apply(q_BHTD, cos, sin), _Rotation.apply(k_BKTD, cos, sin)


class _Rotation(torch.autograd.Function):
    """`cos * (a, b) + sin * (-b, a)`, of the halves `a` and `b` of each head."""

    @staticmethod
    def forward(ctx: Any, x_BHTD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        out = x_BHTD * cos
        a, b = x_BHTD.chunk(2, -1)
        sin_a, sin_b = sin.chunk(2, -1)
        out_a, out_b = out.chunk(2, -1)
        out_a.addcmul_(b, sin_a, value=-1)
        out_b.addcmul_(a, sin_b)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHTD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        grad_x = grad_BHTD * cos
        grad_a, grad_b = grad_BHTD.chunk(2, -1)
        sin_a, sin_b = sin.chunk(2, -1)
        of_a, of_b = grad_x.chunk(2, -1)
        of_a.addcmul_(grad_b, sin_b)
        of_b.addcmul_(grad_a, sin_a, value=-1)
        return grad_x, None, None
