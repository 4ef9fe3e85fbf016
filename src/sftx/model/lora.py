"""A LoRA layer's own arithmetic: `x W' + b + s (x A') B'` and its gradient, without copies that nobody reads.

PEFT's layer is kept, with its parameters, names and files; only its forward pass is replaced where one
plain adapter is active. What PEFT holds for the backward pass besides `x` (the branch's output, its
scaled copy, the mask and the dropped input in fp32) is not held: `x A'` and one byte a value of the mask are.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from sftx.model.dropout import KeyedDropout


class _Lora(torch.autograd.Function):
    """`x_TI W_OI' + bias_O + scale (keep_TI x_TI) A_RI' B_OR'`; the base is frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: torch.Tensor,
        A_RI: torch.Tensor,
        B_OR: torch.Tensor,
        keep_TI: torch.Tensor | None,
        base: Any,
        scale: float,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        x, A, B = x_TI.to(dtype), A_RI.to(dtype), B_OR.to(dtype)
        W_OI = weight_of(base, dtype)
        out_TO = x @ W_OI.t() if base.bias is None else torch.addmm(base.bias.to(dtype), x, W_OI.t())
        low_TR = (x if keep_TI is None else x * keep_TI) @ A.t()
        out_TO.addmm_(low_TR, B.t(), alpha=scale)
        ctx.save_for_backward(x_TI, A_RI, B_OR, low_TR, keep_TI)
        ctx.base, ctx.scale, ctx.dtype = base, scale, dtype
        return out_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TI, A_RI, B_OR, low_TR, keep_TI = ctx.saved_tensors
        dtype, scale = ctx.dtype, ctx.scale
        A, B = A_RI.to(dtype), B_OR.to(dtype)
        grad_TO = grad_TO.to(dtype)
        grad_B = grad_TO.t() @ low_TR
        grad_low_TR = (grad_TO @ B).mul_(scale)
        x = x_TI.to(dtype)
        grad_A = grad_low_TR.t() @ (x if keep_TI is None else x * keep_TI)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_TO @ weight_of(ctx.base, dtype)
            if keep_TI is None:
                grad_x.addmm_(grad_low_TR, A)
            else:
                grad_x.addcmul_(grad_low_TR @ A, keep_TI.to(dtype))
            grad_x = grad_x.to(x_TI.dtype)
        return grad_x, grad_A.to(A_RI.dtype), grad_B.mul_(scale).to(B_OR.dtype), None, None, None, None


def weight_of(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return a layer's weight `[out, in]` in a number format; one in 4 bits is unfolded for the moment."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return layer.weight.to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, state).to(dtype)


def is_plain(layer: Any) -> bool:
    """Tell whether a layer is a matrix product with a weight that `weight_of` can read."""
    if type(layer) is nn.Linear:
        return True
    return type(layer).__name__ == "Linear4bit" and getattr(layer.weight, "quant_state", None) is not None


def speed_up(layer: Any) -> None:
    """Make one of PEFT's LoRA layers, where it can be, one that computes the same for less."""
    if is_plain(layer.base_layer) and not isinstance(layer, Lean):
        kind: Any = type(layer)
        layer.__class__ = _lean(kind)  # all layers of a kind share one forward: it is compiled once


@cache
def _lean(kind: Any) -> Any:
    return type(kind.__name__, (Lean, kind), {"__module__": kind.__module__})


class Lean:
    """What is put before PEFT's own class of a LoRA layer."""

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the layer's output; in PEFT's way where more than one plain adapter is asked for."""
        name = self.active_adapters[0]
        alone = len(self.active_adapters) == 1 and name in self.lora_A and not (args or kwargs)
        if not alone or self.disable_adapters or self.merged or self.use_dora.get(name):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        dropout, scale, keep = self.lora_dropout[name], self.scaling[name], None
        x_TI = x.reshape(-1, x.shape[-1])
        if isinstance(dropout, KeyedDropout) and dropout.drops:
            keep, kept = dropout.keep(x_TI)
            scale = scale / kept
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        A, B = self.lora_A[name].weight, self.lora_B[name].weight
        out_TO = _Lora.apply(x_TI, A, B, keep, self.base_layer, scale, dtype)
        return out_TO.view(*x.shape[:-1], out_TO.shape[-1])
