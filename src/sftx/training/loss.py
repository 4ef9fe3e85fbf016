"""The loss: summed over supervised tokens; the loop divides by the tokens of the whole optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from sftx.data.loader import IGNORE, Batch


def token_losses(model: Callable[..., Any], batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cross entropy of each supervised token, fp32 [N], and the batch row it is in, [N].

    The head runs on positions that carry loss in at least one row, not on the prompt. No attention
    mask is passed: with right padding a causal model never attends to it.
    """
    targets_BT = batch.targets_BT.to(device)
    learned_BT = targets_BT != IGNORE
    positions_P = learned_BT.any(dim=0).nonzero().flatten()
    logits_BPV = model(input_ids=batch.ids_BT.to(device), logits_to_keep=positions_P, use_cache=False).logits
    learned_BP = learned_BT[:, positions_P]
    rows_N = learned_BP.nonzero()[:, 0]
    logits_NV = logits_BPV[learned_BP].float()
    return F.cross_entropy(logits_NV, targets_BT[:, positions_P][learned_BP], reduction="none"), rows_N
