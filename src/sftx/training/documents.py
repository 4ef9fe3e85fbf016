"""Does a model keep rows apart that are laid end to end? It is tried, not assumed."""

from __future__ import annotations

import torch

from sftx.model.adapt import AdaptedModel
from sftx.model.attention import laid_end_to_end
from sftx.training.precision import Numerics

FIRST, SECOND = [7, 3, 11, 5, 9], [2, 8, 4, 10, 6, 12]
"""Two short documents of token ids that every vocabulary has."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Of the largest logit: what two orders of summation may differ by."""


@torch.no_grad()
def documents_leak(model: AdaptedModel, numerics: Numerics, device: torch.device) -> str | None:
    """Return why a second document's logits are not those that it has alone, or None when they are."""
    was_training = model.module.training
    model.module.eval()
    try:
        with numerics.autocast():
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
    finally:
        model.module.train(was_training)
    difference = (both.float() - alone.float()).abs().max().item()
    if difference <= TOLERANCE[numerics.dtype] * max(1.0, alone.float().abs().max().item()):
        return None
    return f"a row's logits change by {difference:.2g} beside another row"
