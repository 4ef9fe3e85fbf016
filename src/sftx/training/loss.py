"""The loss: summed over supervised tokens; the loop divides by their weight in the whole optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from sftx.data.loader import IGNORE, Batch
from sftx.model.attention import laid_end_to_end


class TokenLosses(NamedTuple):
    """Of each supervised token: its cross entropy and weight, fp32 [N], and the batch's row it is in, int64 [N]."""

    losses_N: torch.Tensor
    weights_N: torch.Tensor
    places_N: torch.Tensor

    def weighted_sum(self) -> torch.Tensor:
        """Return the sum that the loop divides."""
        return (self.losses_N * self.weights_N).sum()


def token_losses(model: Callable[..., Any], batch: Batch, device: torch.device) -> TokenLosses:
    """Return the losses of a batch's supervised tokens.

    The head runs on positions that carry loss in at least one row, not on the prompt. No attention
    mask is passed: with right padding a causal model never attends to it, and rows laid end to end
    are kept apart by their lengths.
    """
    targets_BT = batch.targets_BT.to(device, non_blocking=True)
    learned_BT = targets_BT != IGNORE
    positions_P = (batch.targets_BT != IGNORE).any(dim=0).nonzero().flatten().to(device, non_blocking=True)
    inputs: dict[str, Any] = {"input_ids": batch.ids_BT.to(device, non_blocking=True)}
    if batch.positions_BT is not None:
        inputs |= {"position_ids": batch.positions_BT.to(device, non_blocking=True), "document_lengths": batch.lengths}
    with laid_end_to_end() if batch.positions_BT is not None else nullcontext():
        logits_BPV = model(**inputs, logits_to_keep=positions_P, use_cache=False).logits
    learned_BP = learned_BT[:, positions_P]
    losses_N = F.cross_entropy(logits_BPV[learned_BP].float(), targets_BT[:, positions_P][learned_BP], reduction="none")
    weights_N = batch.weights_BT.to(device)[:, positions_P][learned_BP]
    return TokenLosses(losses_N, weights_N, batch.place_BT.to(device)[:, positions_P][learned_BP])
