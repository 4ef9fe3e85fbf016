"""Documents laid end to end on one token axis, each attending only to itself.

The model is loaded with the attention `documents`: where a forward pass is given `document_lengths`,
one causal attention call is made a document and no mask is built; elsewhere it is `sdpa`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

NAME = "documents"
_laid_end_to_end: ContextVar[bool] = ContextVar("laid_end_to_end", default=False)


def register() -> str:
    """Make the attention known to transformers, and return its name."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, _mask)
    return NAME


@contextmanager
def laid_end_to_end() -> Iterator[None]:
    """Let the forward passes inside the block build no mask."""
    token = _laid_end_to_end.set(True)
    try:
        yield
    finally:
        _laid_end_to_end.reset(token)


def _mask(*args: Any, **kwargs: Any) -> Any:
    from transformers.masking_utils import sdpa_mask

    return None if _laid_end_to_end.get() else sdpa_mask(*args, **kwargs)


def attention(
    module: Any,
    query_BHTD: torch.Tensor,
    key_BHTD: torch.Tensor,
    value_BHTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    document_lengths: Sequence[int] | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each document; `[1, heads, tokens, dim]` in, `[1, tokens, heads, dim]` out."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if document_lengths is None:
        return sdpa_attention_forward(module, query_BHTD, key_BHTD, value_BHTD, attention_mask, **kwargs)
    lengths = list(document_lengths)
    documents = zip(*(x.split(lengths, dim=2) for x in (query_BHTD, key_BHTD, value_BHTD)), strict=True)
    out = [
        sdpa_attention_forward(module, q, k, v, _window(q.shape[2], sliding_window, q.device), **kwargs)[0]
        for q, k, v in documents
    ]
    return torch.cat(out, dim=1), None


def _window(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Return the mask of a document longer than the model's attention window, None for others."""
    if window is None or length <= window:
        return None
    at_T = torch.arange(length, device=device)
    behind_TT = at_T[:, None] - at_T[None, :]
    return ((behind_TT >= 0) & (behind_TT < window))[None, None]
