"""Work of a model's blocks that nothing uses is left out, where it is tried that the logits stay the same.

After the last attention only positions with a target matter: the last block's output projection and MLP see no
others. RMSNorm is one function with a gradient of its own instead of a chain of operations that each keep a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from sftx.model.compare import differ

KEPT = "kept_positions"
"""Argument of the forward pass: the positions `[P]` whose output is wanted."""
PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}


class LastBlock:
    """Put before the class of a model's last block, one of Llama's form."""

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the block's output at the wanted positions, all without `kept_positions`."""
        kept_P = kwargs.pop(KEPT, None)
        if kept_P is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        normed = self.input_layernorm(hidden_states)
        hook = self.self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: (inputs[0][:, kept_P],))
        try:
            attended, *_ = self.self_attn(normed, *args, **kwargs)
        finally:
            hook.remove()
        hidden_states = hidden_states[:, kept_P] + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


def shorten(block: Any) -> Callable[[], None] | None:
    """Let a last block leave out what is not wanted, if it has Llama's parts; return what undoes it."""
    if {name for name, _ in block.named_children()} != PARTS or not hasattr(block.self_attn, "o_proj"):
        return None
    kind: Any = type(block)
    block.__class__ = before(LastBlock, kind)
    return lambda: setattr(block, "__class__", kind)


@cache
def before(first: Any, kind: Any) -> Any:
    """Return a class that is `first`, and for the rest `kind`; all of a kind share one."""
    return type(kind.__name__, (first, kind), {"__module__": kind.__module__})


class LeanNorm:
    """Put before the class of an RMSNorm (arXiv:1910.07467)."""

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the rows of `[..., D]` at unit mean square, times the weight."""
        if hidden_states.is_cuda and hidden_states.dtype == self.weight.dtype:  # torch has one kernel for it there
            with torch.autocast("cuda", enabled=False):  # it would cast to fp32, and return that
                return nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)
        return _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)


class _RMSNorm(torch.autograd.Function):
    """`weight_D * x / sqrt(mean(x^2) + eps)`, computed in fp32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        mean = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, scale)
        normed = (wide * scale).to(x.dtype)
        return normed.mul_(weight_D) if weight_D.dtype == x.dtype else normed * weight_D

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight_D, scale = ctx.saved_tensors
        wide, grad = x.float(), grad.float()
        grad_weight = None
        if ctx.needs_input_grad[1]:
            rows = (grad * wide * scale).reshape(-1, x.shape[-1])
            grad_weight = rows.sum(0).to(weight_D.dtype)
        grad = grad * weight_D
        along = torch.linalg.vecdot(grad, wide)[..., None] * scale.pow(3) / x.shape[-1]
        return grad.mul_(scale).addcmul_(wide, along, value=-1).to(x.dtype), grad_weight, None


def lean_norms(model: nn.Module) -> int:
    """Make a model's RMSNorms lean, those that compute just that; return how many."""
    count = 0
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and _is_plain_norm(module):
            kind: Any = type(module)
            module.__class__ = before(LeanNorm, kind)
            count += 1
    return count


def _is_plain_norm(module: Any) -> bool:
    """Tell whether a norm, tried on random rows, is the weight times rows of unit mean square (Gemma's is not)."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if weight is None or not isinstance(eps, float) or weight.ndim != 1 or dict(module.named_children()):
        return False
    generator = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(3, len(weight), generator=generator, device=weight.device)
    with torch.no_grad():
        if not torch.allclose(module(x), _RMSNorm.apply(x, weight, eps), rtol=1e-5, atol=1e-6):
            return False
        x = x.to(weight.dtype)  # on a GPU another kernel takes it
        return not x.is_cuda or differ((LeanNorm.forward(module, x),), (module(x),), x.dtype) is None
