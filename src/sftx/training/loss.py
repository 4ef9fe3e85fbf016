"""The loss: summed over supervised tokens; the loop divides by their weight in the whole optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from sftx.data.batches.collate import IGNORE, Batch
from sftx.model.adapt import AdaptedModel
from sftx.model.head import LossRequest
from sftx.model.kernels.attention import padding_free_inputs
from sftx.tensors import to_device


class TokenLosses(NamedTuple):
    """A batch's weighted sum of losses, the sum that the loop divides, and what it is made of.

    Of each supervised token: its cross entropy and weight, fp32 [N], and the batch's row it is in, int64 [N].
    """

    weighted_sum: torch.Tensor
    losses_N: torch.Tensor
    weights_N: torch.Tensor
    places_N: torch.Tensor


LossFunction = Callable[[AdaptedModel, Batch, torch.device], TokenLosses]


def token_losses(model: AdaptedModel, batch: Batch, device: torch.device) -> TokenLosses:
    """Return the losses of a batch's supervised tokens.

    The head runs on positions that carry loss in at least one row, not on the prompt. No attention
    mask is passed: with right padding a causal model never attends to it, and padding-free rows are kept apart
    by their lengths.
    """
    supervised_BT = batch.targets_BT != IGNORE
    positions_P = supervised_BT.any(dim=0).nonzero().flatten()
    selected_N = None  # without padding every position that is kept has a target
    if batch.positions_BT is None:
        selected_N = to_device(supervised_BT[:, positions_P].flatten().nonzero().flatten(), device)
    targets_N, weights_N, places_N = (
        to_device(tensor[supervised_BT], device) for tensor in (batch.targets_BT, batch.weights_BT, batch.row_index_BT)
    )
    inputs: dict[str, Any] = {"input_ids": to_device(batch.ids_BT, device), "use_cache": False}
    if batch.positions_BT is not None:
        inputs |= padding_free_inputs(to_device(batch.positions_BT, device), batch.lengths)
    request = LossRequest(targets_N, weights_N, to_device(positions_P, device), selected_N)
    weighted_sum, losses_N = model.losses(request, **inputs)
    return TokenLosses(weighted_sum, losses_N, weights_N, places_N)
