"""Documents laid end to end on one token axis, each attending only to itself.

The model is loaded with an attention of sftx's own: where a forward pass is given `document_lengths`,
one causal attention call is made a document and no mask over all of them is built; elsewhere it is the
implementation that it is named after.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch

from sftx.errors import ModelError

IMPLEMENTATIONS = ("sdpa", "eager")
"""Those that train on a CPU; torch's flex attention has no backward there."""
_laid_end_to_end: ContextVar[bool] = ContextVar("laid_end_to_end", default=False)


def name_of(implementation: str) -> str:
    """Return what transformers calls sftx's attention over an implementation."""
    return f"documents_{implementation}"


def register(implementation: str) -> str:
    """Make an attention known to transformers, and return its name."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask, sdpa_mask

    name = name_of(implementation)
    masks = {"sdpa": sdpa_mask, "eager": eager_mask}
    AttentionInterface.register(name, partial(attention, {"sdpa": _sdpa, "eager": _eager}[implementation]))
    AttentionMaskInterface.register(name, partial(_mask, masks[implementation]))
    return name


def leave_uncompiled(implementation: str) -> None:
    """Keep an attention that is registered out of what TorchDynamo traces: it loops over documents."""
    from transformers import AttentionInterface

    name = name_of(implementation)
    AttentionInterface.register(name, torch.compiler.disable(AttentionInterface()[name]))


@contextmanager
def laid_end_to_end() -> Iterator[None]:
    """Let the forward passes inside the block build no mask."""
    token = _laid_end_to_end.set(True)
    try:
        yield
    finally:
        _laid_end_to_end.reset(token)


def _mask(build: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return None if _laid_end_to_end.get() else build(*args, **kwargs)


def attention(
    attend: Callable[..., tuple[torch.Tensor, Any]],
    module: Any,
    query_BHTD: torch.Tensor,
    key_BHTD: torch.Tensor,
    value_BHTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    document_lengths: Sequence[int] | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, Any]:
    """Attend within each document; `[1, heads, tokens, dim]` in, `[1, tokens, heads, dim]` out."""
    if document_lengths is None:
        return attend(module, query_BHTD, key_BHTD, value_BHTD, attention_mask, **kwargs)
    lengths = list(document_lengths)
    documents = zip(*(x.split(lengths, dim=2) for x in (query_BHTD, key_BHTD, value_BHTD)), strict=True)
    needs_mask = attend is _eager
    out = [
        attend(
            module, q, k, v, _causal(q, sliding_window) if needs_mask or _beyond(q, sliding_window) else None, **kwargs
        )
        for q, k, v in documents
    ]
    return torch.cat([o for o, _ in out], dim=1), None


def _sdpa(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **kwargs: Any
) -> tuple[torch.Tensor, Any]:
    """Call torch's attention; keys that several heads share are not copied for each where its kernel can do without."""
    if mask is None and not kwargs.get("dropout") and (query.device.type == "cpu" or query.dtype != torch.float32):
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=query.shape[2] > 1, scale=kwargs.get("scaling"),
            enable_gqa=key.shape[1] != query.shape[1],
        )  # fmt: skip
        return out.transpose(1, 2), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


def _eager(module: Any, *tensors: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
    """Call what the architecture's own file calls eager: matrix products and a softmax."""
    forward = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if forward is None:
        raise ModelError(f"attn_implementation=eager: {type(module).__name__} has none; use attn_implementation=sdpa.")
    return forward(module, *tensors, **kwargs)


def _beyond(query_BHTD: torch.Tensor, window: int | None) -> bool:
    """Tell whether a document is longer than the model's attention window."""
    return window is not None and query_BHTD.shape[2] > window


def _causal(query_BHTD: torch.Tensor, window: int | None) -> torch.Tensor:
    """Return what is added to the scores of a document: nothing behind a token and within the window, else -inf."""
    at_T = torch.arange(query_BHTD.shape[2], device=query_BHTD.device)
    behind_TT = at_T[:, None] - at_T[None, :]
    seen_TT = (behind_TT >= 0) & (behind_TT < (window or len(at_T)))
    return torch.zeros_like(seen_TT, dtype=query_BHTD.dtype).masked_fill_(~seen_TT, -torch.inf)[None, None]
