"""The arithmetic of a LoRA layer, `x W' + b + scale (keep * x) A' B'`, and its gradient.

For the backward pass PEFT's layer holds the branch's output, its scaled copy, the mask and the dropped input in fp32.
This one holds `x`, `x A'` and one byte a value of the mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable


class Update(NamedTuple):
    """A low-rank update of the tokens `[start, stop)`; `keep_TI` is the dropout mask, int8."""

    start: int
    stop: int
    scale: float
    keep_TI: torch.Tensor | None
    A_RI: torch.Tensor
    B_OR: torch.Tensor


def lora_linear(x_TI: torch.Tensor, base: Any, updates: Sequence[Update], dtype: torch.dtype) -> torch.Tensor:
    """Return the output of a frozen linear layer with low-rank updates; `[T, O]`.

    The base's product is computed once for all tokens, whichever adapters they use. `dtype` is that of the arithmetic.
    """
    factors = [factor for update in updates for factor in (update.A_RI, update.B_OR)]
    out: torch.Tensor = _LoraLinear.apply(x_TI, base, [u[:3] for u in updates], [u.keep_TI for u in updates], dtype,
                                          *factors)  # fmt: skip
    return out


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TI: torch.Tensor,
        base: Any,
        spans: Sequence[tuple[int, int, float]],
        keeps: Sequence[torch.Tensor | None],
        dtype: torch.dtype,
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        x = x_TI.to(dtype)
        W_OI = weight_of(base, dtype)
        out_TO = x @ W_OI.t() if base.bias is None else torch.addmm(base.bias.to(dtype), x, W_OI.t())
        lows = []
        for (start, stop, scale), keep, (A, B) in zip(spans, keeps, _pairs(factors, dtype), strict=True):
            low_TR = _dropped(x[start:stop], keep) @ A.t()
            out_TO[start:stop].addmm_(low_TR, B.t(), alpha=scale)
            lows.append(low_TR)
        ctx.save_for_backward(x_TI, *factors, *lows, *keeps)
        ctx.base, ctx.spans, ctx.dtype = base, spans, dtype
        return out_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        count, dtype = len(ctx.spans), ctx.dtype
        x_TI, *saved = ctx.saved_tensors
        factors, lows, keeps = saved[: 2 * count], saved[2 * count : 3 * count], saved[3 * count :]
        x, grad_TO = x_TI.to(dtype), grad_TO.to(dtype)
        grad_x = grad_TO @ weight_of(ctx.base, dtype) if ctx.needs_input_grad[0] else None
        grad_factors: list[torch.Tensor] = []
        for (start, stop, scale), keep, low_TR, (A, B) in zip(
            ctx.spans, keeps, lows, _pairs(factors, dtype), strict=True
        ):
            grad = grad_TO[start:stop]
            grad_low_TR = (grad @ B).mul_(scale)
            grad_factors += [grad_low_TR.t() @ _dropped(x[start:stop], keep), (low_TR.t() @ grad).mul_(scale).t()]
            if grad_x is not None and keep is None:
                grad_x[start:stop].addmm_(grad_low_TR, A)
            elif grad_x is not None:
                grad_x[start:stop].addcmul_(grad_low_TR @ A, keep.to(dtype))
        trained = (grad.to(factor.dtype) for grad, factor in zip(grad_factors, factors, strict=True))
        return (None if grad_x is None else grad_x.to(x_TI.dtype)), None, None, None, None, *trained


def _pairs(factors: Sequence[torch.Tensor], dtype: torch.dtype) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return ((A.to(dtype), B.to(dtype)) for A, B in zip(factors[::2], factors[1::2], strict=True))


def _dropped(x: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    return x if keep is None else x * keep


def weight_of(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return a layer's weight `[out, in]` in a number format; a 4-bit weight is dequantized for the moment."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return layer.weight.to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, state).to(dtype)
