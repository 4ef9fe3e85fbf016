"""LoRA layers' own arithmetic: `x W' + b + s (x A') B'` and its gradient, without copies that nobody reads.

PEFT's layers are kept, with their parameters, names and files; only the forward pass is replaced where one
plain adapter is active. What PEFT holds for the backward pass besides `x` (the branch's output, its
scaled copy, the mask and the dropped input in fp32) is not held: `x A'` and one byte a value of the mask are.
Layers that share their input (queries, keys and values; gate and up) are computed together.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from sftx.model.dropout import KeyedDropout


class _Lora(torch.autograd.Function):
    """`x W' + bias + scale (keep * x) A' B'` of each layer that is given `x_TI`; the bases are frozen.

    `factors` are `A_RI` and `B_OR` of the first layer, of the second and so on. Without `keeps_TI`, dropout's, the
    products with all `A` are one: narrow ones are slow.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: torch.Tensor,
        bases: Sequence[Any],
        scales: Sequence[float],
        keeps_TI: Sequence[torch.Tensor],
        dtype: torch.dtype,
        *factors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        x = x_TI.to(dtype)
        As, Bs = _factors(factors, dtype)
        if keeps_TI:
            lows = [(x * keep) @ A.t() for keep, A in zip(keeps_TI, As, strict=True)]
        else:
            lows = list((x @ _one(As).t()).split([len(A) for A in As], 1))
        outs = []
        for base, scale, low_TR, B in zip(bases, scales, lows, Bs, strict=True):
            W_OI = weight_of(base, dtype)
            out_TO = x @ W_OI.t() if base.bias is None else torch.addmm(base.bias.to(dtype), x, W_OI.t())
            outs.append(out_TO.addmm_(low_TR, B.t(), alpha=scale))
        ctx.save_for_backward(x_TI, *factors, *lows, *keeps_TI)
        ctx.bases, ctx.scales, ctx.dtype = bases, scales, dtype
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        count, dtype = len(grads), ctx.dtype
        x_TI, *saved = ctx.saved_tensors
        factors, lows, keeps_TI = saved[: 2 * count], saved[2 * count : 3 * count], saved[3 * count :]
        As, Bs = _factors(factors, dtype)
        x, grads = x_TI.to(dtype), tuple(grad.to(dtype) for grad in grads)
        of_low = x.new_empty(len(x), sum(map(len, As)))
        of_lows = of_low.split([len(A) for A in As], 1)
        of_Bs = []
        for grad_TO, B, low_TR, of_low_TR, scale in zip(grads, Bs, lows, of_lows, ctx.scales, strict=True):
            torch.mm(grad_TO, B, out=of_low_TR).mul_(scale)
            of_Bs.append((low_TR.t() @ grad_TO).mul_(scale).t())
        if keeps_TI:
            of_As = [low.t() @ (x * keep) for low, keep in zip(of_lows, keeps_TI, strict=True)]
        else:
            of_As = list((of_low.t() @ x).split([len(A) for A in As]))
        of_factors = (of for pair in zip(of_As, of_Bs, strict=True) for of in pair)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = grads[0] @ weight_of(ctx.bases[0], dtype)
            for grad_TO, base in zip(grads[1:], ctx.bases[1:], strict=True):
                of_x.addmm_(grad_TO, weight_of(base, dtype))
            if not keeps_TI:
                of_x.addmm_(of_low, _one(As))
            for low, A, keep in zip(of_lows, As, keeps_TI):  # noqa: B905 - none without dropout
                of_x.addcmul_(low @ A, keep.to(dtype))
            of_x = of_x.to(x_TI.dtype)
        trained = (of.to(factor.dtype) for of, factor in zip(of_factors, factors, strict=True))
        return of_x, None, None, None, None, *trained


def _factors(factors: Sequence[torch.Tensor], dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return [A.to(dtype) for A in factors[::2]], [B.to(dtype) for B in factors[1::2]]


def _one(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(list(matrices))


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


SHARE = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers that a block gives one and the same tensor, in the order in which it does."""


def speed_up(model: nn.Module) -> None:
    """Make PEFT's LoRA layers, those that can be, ones that compute the same for less."""
    for parent in model.modules():
        children = dict(parent.named_children())
        lean: dict[str, Any] = {name: child for name, child in children.items() if _make_lean(child)}
        for names in SHARE:
            if all(name in lean for name in names):
                shared = SharedInput([lean[name] for name in names])
                for name in names:
                    lean[name].shared = shared


def _make_lean(layer: Any) -> bool:
    if not isinstance(getattr(layer, "lora_A", None), nn.ModuleDict) or not is_plain(layer.base_layer):
        return False
    if not isinstance(layer, Lean):
        kind: Any = type(layer)
        layer.__class__ = _lean(kind)  # all layers of a kind share one forward: it is compiled once
    return True


@cache
def _lean(kind: Any) -> Any:
    return type(kind.__name__, (Lean, kind), {"__module__": kind.__module__})


class Lean:
    """What is put before PEFT's own class of a LoRA layer."""

    shared: SharedInput | None = None

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the layer's output; in PEFT's way where more than one plain adapter is asked for."""
        if args or kwargs or not _has_one_plain_adapter(self):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        if torch.compiler.is_compiling():  # it fuses PEFT's own; a weight in 4 bits would be held unfolded
            whole = type(self.base_layer) is nn.Linear
            return super().forward(x) if whole else _output_uncompiled(self, x)  # type: ignore[misc]
        return _outputs([self], x)[0] if self.shared is None else self.shared.output(self, x)


@torch.compiler.disable
def _output_uncompiled(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return _outputs([layer], x)[0]


class SharedInput:
    """Layers that are given the same tensor one after the other: the first computes for all."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = layers
        self._x: torch.Tensor | None = None
        self._waiting: dict[int, torch.Tensor] = {}

    def output(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        """Return a layer's output, which may have been made with that of the first."""
        if self._x is not x or id(layer) not in self._waiting:
            all_at_once = layer is self.layers[0] and all(map(_has_one_plain_adapter, self.layers))
            layers = self.layers if all_at_once else [layer]
            self._x, self._waiting = x, dict(zip(map(id, layers), _outputs(layers, x), strict=True))
        out = self._waiting.pop(id(layer))
        if not self._waiting:
            self._x = None  # what nobody waits for is not held
        return out


def _has_one_plain_adapter(layer: Any) -> bool:
    name = layer.active_adapters[0]
    alone = len(layer.active_adapters) == 1 and name in layer.lora_A
    return alone and not (layer.disable_adapters or layer.merged or layer.use_dora.get(name))


def _outputs(layers: Sequence[Any], x: torch.Tensor) -> list[torch.Tensor]:
    """Return the outputs of layers with one plain adapter each, of the same input."""
    x_TI = x.reshape(-1, x.shape[-1])
    scales, keeps_TI, factors = [], [], []
    for layer in layers:
        (name,) = layer.active_adapters
        dropout, scale = layer.lora_dropout[name], layer.scaling[name]
        if isinstance(dropout, KeyedDropout) and dropout.drops:
            keep, kept = dropout.keep(x_TI)
            keeps_TI.append(keep)
            scale = scale / kept
        scales.append(scale)
        factors += [layer.lora_A[name].weight, layer.lora_B[name].weight]
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    outs = _Lora.apply(x_TI, [layer.base_layer for layer in layers], scales, keeps_TI, dtype, *factors)
    return [out_TO.view(*x.shape[:-1], out_TO.shape[-1]) for out_TO in outs]
