"""The loss, computed from hidden states: the decoder is called for them, and this head after it.

It runs on supervised positions only, and on a few of them at a time: the logits of a whole batch are never held. The
gradient is computed in the forward pass, piece by piece while a piece's logits are there, so none is computed twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.profiler import record_function

from sftx.model.kernels.cross_entropy import losses

HEAD = "sftx: head and loss"
"""Name of this part of a step in a profile."""
PIECE_BYTES = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}
"""Logits held at a time, fp32."""
CPU_COLUMNS = 1024
"""Of the vocabulary that are multiplied at a time on a CPU: a product as wide as all of it is a twentieth slower."""
FP16_LARGEST = 2.0**10
"""Largest derivative of a logit in fp16: keeps probabilities of 1e-7 from vanishing, which no loss scaler can do."""


@dataclass(frozen=True)
class LossRequest:
    """Which tokens' losses a forward pass is to return, summed by weight."""

    targets_N: torch.Tensor
    weights_N: torch.Tensor
    positions_P: torch.Tensor
    """Positions of the sequence axis that are supervised in at least one row."""
    selected_N: torch.Tensor | None = None
    """Of the rows' tokens at those positions, flattened, the supervised ones; None: all."""

    def select(self, x_BPD: torch.Tensor) -> torch.Tensor:
        """Return the supervised tokens of what is computed at `positions_P`, `[N, D]`."""
        x_ND = x_BPD.flatten(0, 1)
        return x_ND if self.selected_N is None else x_ND[self.selected_N]


class LossHead(nn.Module):
    """The language-model head with its loss, on the parameters of the model's own head.

    They are parameters of this module too, so that DeepSpeed gathers them when it is called.
    """

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = head.weight, head.bias
        self.triton = False
        """Cross entropies are computed by sftx's Triton kernel."""

    def forward(
        self, hidden_ND: torch.Tensor, targets_N: torch.Tensor, weights_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weighted sum of the tokens' cross entropies, and each of them, fp32, without a gradient."""
        kind = hidden_ND.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.weight.dtype
        tensors: tuple[torch.Tensor | None, ...] = (hidden_ND, self.weight, self.bias)
        if not torch.is_grad_enabled():  # an autograd function does not see that, and would compute the gradients
            tensors = tuple(None if x is None else x.detach() for x in tensors)
        with record_function(HEAD), torch.autocast(kind, enabled=False):
            total, losses_N = _HeadLoss.apply(*tensors, targets_N, weights_N, dtype, self.triton)
        return total, losses_N


class ModelWithLoss(nn.Module):
    """A language model that returns losses instead of logits where it is given a request."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        head = model.get_output_embeddings()
        self.loss_head = LossHead(head) if type(head) is nn.Linear and hasattr(model, "get_decoder") else None

    def forward(self, *, request: LossRequest | None = None, through_head: bool = False, **inputs: Any) -> Any:
        """Return the model's own output; the losses of a request; or the head's output for the hidden states."""
        if request is None and not through_head:
            return self.model(**inputs)
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        hidden_BTD = model.get_decoder()(**inputs).last_hidden_state
        if request is None:
            return model.get_output_embeddings()(hidden_BTD)
        assert self.loss_head is not None, "the model was probed before training"
        return self.loss_head(request.select(hidden_BTD[:, request.positions_P]), request.targets_N, request.weights_N)


def piece_rows(vocabulary: int, device: torch.device) -> int:
    """Return how many rows of logits are held at a time."""
    return max(16, PIECE_BYTES.get(device.type, PIECE_BYTES["cuda"]) // (4 * vocabulary))


def _multiply(hidden_PD: torch.Tensor, W_VD: torch.Tensor, out_PV: torch.Tensor) -> torch.Tensor:
    """Put logits into `out_PV`, and return it."""
    columns = CPU_COLUMNS if W_VD.device.type == "cpu" else len(W_VD)
    for W, out in zip(W_VD.split(columns), out_PV.split(columns, 1), strict=True):
        torch.mm(hidden_PD, W.t(), out=out)
    return out_PV


def _wide(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a product in fp32: in fp16 a sum over many rows overflows."""
    if a.dtype == torch.float32:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _scaled(weights_N: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the weights that derivatives in a number format are computed with, and the factor that is still missing.

    Without a wait for the device, whatever the weights are: in fp16 the largest becomes FP16_LARGEST.
    """
    if dtype != torch.float16 or not len(weights_N):
        return weights_N, None
    factor = weights_N.amax().clamp(min=torch.finfo(torch.float32).tiny * FP16_LARGEST) / FP16_LARGEST
    return weights_N / factor, factor


class _HeadLoss(torch.autograd.Function):
    """`sum_N weight_N * cross_entropy(hidden_ND W_VD' + bias_V, target_N)`, and each token's own."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        W_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_N: torch.Tensor,
        weights_N: torch.Tensor,
        dtype: torch.dtype,
        triton: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wants_hidden, wants_W, wants_bias = ctx.needs_input_grad[:3]
        W = W_VD.to(dtype)
        losses_N = torch.empty(len(targets_N), device=hidden_ND.device)
        grad_ND = torch.empty_like(hidden_ND, dtype=torch.float32) if wants_hidden else None
        grad_W = torch.zeros_like(W_VD, dtype=torch.float32) if wants_W else None
        grad_bias = torch.zeros_like(bias_V, dtype=torch.float32) if wants_bias and bias_V is not None else None
        scaled_N, factor = _scaled(weights_N, dtype)
        pieces = math.ceil(len(targets_N) / piece_rows(len(W), hidden_ND.device))
        rows = math.ceil(len(targets_N) / max(pieces, 1)) or 1  # equal ones: a last, small one would cost more
        held_PV = torch.empty(min(rows, len(targets_N)), len(W), dtype=dtype, device=W.device)
        for piece in (slice(i, i + rows) for i in range(0, len(targets_N), rows)):
            hidden = hidden_ND[piece].to(dtype)
            logits_PV = _multiply(hidden, W, held_PV[: len(hidden)])
            if bias_V is not None:
                logits_PV.add_(bias_V)
            weights_P = scaled_N[piece] if any(ctx.needs_input_grad[:3]) else None
            slope_PV = losses(logits_PV, targets_N[piece], weights_P, losses_N[piece], kernel=triton)
            if weights_P is None:
                continue
            if grad_bias is not None:
                grad_bias += slope_PV.sum(0, dtype=torch.float32)
            slope_PV = slope_PV.to(dtype)
            if grad_ND is not None:
                grad_ND[piece] = _wide(slope_PV, W)
            if grad_W is not None and dtype == torch.float32:
                grad_W.addmm_(slope_PV.t(), hidden)
            elif grad_W is not None:
                grad_W.add_(_wide(slope_PV.t(), hidden))
        ctx.grads, ctx.factor = (grad_ND, grad_W, grad_bias), factor
        ctx.dtypes = hidden_ND.dtype, W_VD.dtype, bias_V.dtype if bias_V is not None else None
        ctx.mark_non_differentiable(losses_N)
        return (losses_N * weights_N).sum(), losses_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if ctx.factor is not None:
            grad = grad * ctx.factor
        pairs = zip(ctx.grads, ctx.dtypes, strict=True)
        grads = [g.mul_(grad).to(dtype) if g is not None else None for g, dtype in pairs]
        ctx.grads = None
        return (*grads, None, None, None, None)
