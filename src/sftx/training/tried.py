"""What a model can do is tried, not assumed: it keeps rows apart; its head's output is its logits; its last block
need not compute what is not wanted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from sftx.model.adapt import AdaptedModel, blocks_of
from sftx.model.attention import laid_end_to_end
from sftx.model.head import LossHead
from sftx.model.shortcuts import KEPT, shorten
from sftx.training.precision import Numerics

FIRST, SECOND = [7, 3, 11, 5, 9], [2, 8, 4, 10, 6, 12]
"""Two short documents of token ids that every vocabulary has."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Of the largest logit: what two orders of summation may differ by."""


@contextmanager
def _as_in_evaluation(model: AdaptedModel, numerics: Numerics) -> Iterator[None]:
    was_training = model.module.training
    model.module.eval()
    try:
        with torch.no_grad(), numerics.autocast():
            yield
    finally:
        model.module.train(was_training)


def documents_leak(model: AdaptedModel, numerics: Numerics, device: torch.device) -> str | None:
    """Return why a second document's logits are not those that it has alone, or None when they are."""
    try:
        with _as_in_evaluation(model, numerics):
            alone = model(input_ids=torch.tensor([SECOND], device=device), use_cache=False).logits[0]
            lengths = (len(FIRST), len(SECOND))
            positions = torch.tensor([[*range(lengths[0]), *range(lengths[1])]], device=device)
            with laid_end_to_end():
                both = model(
                    input_ids=torch.tensor([FIRST + SECOND], device=device),
                    position_ids=positions,
                    document_lengths=lengths,
                    use_cache=False,
                ).logits[0, lengths[0] :]
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:  # an architecture with other arguments
        return (str(error).splitlines() or [type(error).__name__])[0]
    difference = (both.float() - alone.float()).abs().max().item()
    if difference <= TOLERANCE[numerics.dtype] * max(1.0, alone.float().abs().max().item()):
        return None
    return f"a row's logits change by {difference:.2g} beside another row"


def loss_head(model: AdaptedModel, numerics: Numerics, device: torch.device) -> LossHead | None:
    """Return the model's head that can answer with losses; None where its output is not the model's logits.

    Some architectures cap or scale what the head returns (Gemma 2, Cohere, Granite); they keep the plain way.
    """
    layer = model.module.get_output_embeddings()
    if type(layer) is not nn.Linear:
        return None
    head = LossHead(layer)
    seen: list[torch.Tensor] = []

    def note(logits: torch.Tensor) -> torch.Tensor:
        seen.append(logits)
        return logits

    with _as_in_evaluation(model, numerics), head.asked(note):
        logits = model(input_ids=torch.tensor([SECOND], device=device), use_cache=False).logits
    if len(seen) == 1 and torch.equal(seen[0].float(), logits.float()):
        return head
    head.remove()
    return None


def last_block_shortened(model: AdaptedModel, numerics: Numerics, device: torch.device) -> bool:
    """Let the model's last block leave out positions without a target, if its logits stay the same; tell whether."""
    blocks = blocks_of(model.module)
    undo = shorten(blocks[-1]) if blocks else None
    if undo is None:
        return False
    ids, kept = torch.tensor([FIRST + SECOND], device=device), torch.tensor([1, 4, 9], device=device)
    try:
        with _as_in_evaluation(model, numerics):
            whole = model(input_ids=ids, use_cache=False).logits[:, kept]
            short = model(input_ids=ids, use_cache=False, **{KEPT: kept}).logits
    except (TypeError, ValueError, RuntimeError, AttributeError):  # an architecture with other arguments
        undo()
        return False
    if whole.shape == short.shape:
        difference = (whole.float() - short.float()).abs().max().item()
        if difference <= TOLERANCE[numerics.dtype] * max(1.0, whole.float().abs().max().item()):
            return True
    undo()
    return False
