"""The loss: summed over supervised tokens; the loop divides by their weight in the whole optimizer step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from sftx.data.loader import IGNORE, Batch
from sftx.model.adapt import AdaptedModel
from sftx.model.attention import end_to_end
from sftx.model.head import Asked
from sftx.model.shortcuts import KEPT
from sftx.tensors import to_device


class TokenLosses(NamedTuple):
    """A batch's weighted sum of losses, the sum that the loop divides, and what it is made of.

    Of each supervised token: its cross entropy and weight, fp32 [N], and the batch's row it is in, int64 [N].
    """

    weighted_sum: torch.Tensor
    losses_N: torch.Tensor
    weights_N: torch.Tensor
    places_N: torch.Tensor


def token_losses(model: AdaptedModel, batch: Batch, device: torch.device) -> TokenLosses:
    """Return the losses of a batch's supervised tokens.

    The head runs on positions that carry loss in at least one row, not on the prompt. No attention
    mask is passed: with right padding a causal model never attends to it, and rows laid end to end
    are kept apart by their lengths.
    """
    learned_BT = batch.targets_BT != IGNORE
    positions_P = learned_BT.any(dim=0).nonzero().flatten()
    selected_N = None  # with rows end to end every position that is kept has a target
    if batch.positions_BT is None:
        selected_N = to_device(learned_BT[:, positions_P].flatten().nonzero().flatten(), device)
    targets_N, weights_N, places_N = (
        to_device(tensor[learned_BT], device) for tensor in (batch.targets_BT, batch.weights_BT, batch.place_BT)
    )
    inputs: dict[str, Any] = {
        "input_ids": to_device(batch.ids_BT, device),
        KEPT if model.keeps_early else "logits_to_keep": to_device(positions_P, device),
        "use_cache": False,
    }
    if batch.positions_BT is not None:
        inputs |= end_to_end(to_device(batch.positions_BT, device), batch.lengths)
    if model.loss_head is not None:
        asked = Asked(targets_N, weights_N, selected_N)
        with model.loss_head.asked(asked):
            weighted_sum = model(**inputs).logits
        assert asked.losses_N is not None, "the head was tried before training"
        return TokenLosses(weighted_sum, asked.losses_N, weights_N, places_N)
    logits_NV = model(**inputs).logits.flatten(0, 1)
    if selected_N is not None:
        logits_NV = logits_NV[selected_N]
    losses_N = F.cross_entropy(logits_NV.float(), targets_N, reduction="none")
    return TokenLosses((losses_N * weights_N).sum(), losses_N, weights_N, places_N)
