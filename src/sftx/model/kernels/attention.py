"""Padding-free documents on one token axis, each attending only to itself.

The model is loaded with an attention of sftx's own: where a forward pass is given `document_lengths`,
one causal attention call is made a document and no mask over all of them is built; elsewhere it is the
implementation that it is named after.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache, lru_cache, partial
from inspect import signature
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import torch

from sftx.errors import ModelError
from sftx.model.kernels import cpu_attention
from sftx.tensors import to_device

IMPLEMENTATIONS = ("sdpa", "eager")
"""Those that train on a CPU; torch's flex attention has no backward there."""
VARLEN = "varlen"
"""Name of the kernel that takes all documents in one call."""


def name_of(implementation: str) -> str:
    """Return what transformers calls sftx's attention over an implementation."""
    return f"documents_{implementation}"


def register(implementation: str) -> str:
    """Make an attention known to transformers, and return its name."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask, sdpa_mask

    name = name_of(implementation)
    attend, mask = (_eager, eager_mask) if implementation == "eager" else (_sdpa, sdpa_mask)
    AttentionInterface.register(name, partial(attention, attend, together=implementation == VARLEN))
    AttentionMaskInterface.register(name, mask)
    return name


def leave_uncompiled(implementation: str) -> None:
    """Keep an attention that is registered out of what TorchDynamo traces: it loops over documents."""
    from transformers import AttentionInterface

    name = name_of(implementation)
    AttentionInterface.register(name, torch.compiler.disable(AttentionInterface()[name]))


def padding_free_inputs(positions_1T: torch.Tensor, lengths: Sequence[int]) -> dict[str, Any]:
    """Return the inputs of a forward pass for padding-free documents.

    A mask of four dimensions is taken as it is by transformers: it builds none, and does not read the positions back
    from the device to find out where documents begin. Nobody looks at this one.
    """
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=positions_1T.device)
    return {"position_ids": positions_1T, "document_lengths": lengths, "attention_mask": mask}


def attention(
    attend: Callable[..., tuple[torch.Tensor, Any]],
    module: Any,
    query_BHTD: torch.Tensor,
    key_BHTD: torch.Tensor,
    value_BHTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    document_lengths: Sequence[int] | None = None,
    sliding_window: int | None = None,
    together: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, Any]:
    """Attend within each document, in one call if `together`; `[1, heads, T, dim]` in, `[1, T, heads, dim]` out."""
    if document_lengths is None:
        return attend(module, query_BHTD, key_BHTD, value_BHTD, attention_mask, **kwargs)
    if together and not kwargs.get("dropout"):
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query_BHTD, key_BHTD, value_BHTD))
        return varlen(q, k, v, tuple(document_lengths), kwargs.get("scaling"), sliding_window)[None], None
    lengths = list(document_lengths)
    plain = not kwargs.get("dropout") and not _beyond(max(lengths), sliding_window)
    if attend is _sdpa and plain and cpu_attention.usable(query_BHTD):
        q, k, v = (x.squeeze(0) for x in (query_BHTD, key_BHTD, value_BHTD))  # not x[0]: its gradient is a copy
        out_THD = cpu_attention.attend(q, k, v, lengths, kwargs.get("scaling"))
        return out_THD[None], None
    documents = zip(*(x.split(lengths, dim=2) for x in (query_BHTD, key_BHTD, value_BHTD)), strict=True)
    needs_mask = attend is _eager
    results = [
        attend(
            module, q, k, v, _causal(q, sliding_window) if needs_mask or _beyond(n, sliding_window) else None, **kwargs
        )
        for (q, k, v), n in zip(documents, lengths, strict=True)
    ]
    return torch.cat([o for o, _ in results], dim=1), None


def varlen(
    query_THD: torch.Tensor,
    key_TKD: torch.Tensor,
    value_TKD: torch.Tensor,
    lengths: tuple[int, ...],
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    """Attend within each document by torch's kernel for them (FlashAttention or cuDNN); `[tokens, heads, dim]`."""
    from torch.nn.attention.varlen import varlen_attn

    shared = key_TKD.shape[1] != query_THD.shape[1] and _takes_enable_gqa(varlen_attn)
    extra: dict[str, Any] = {"enable_gqa": True} if shared else {}
    ends = _ends(lengths, query_THD.device)
    if torch.is_autocast_enabled(query_THD.device.type):  # full mode rotates in fp32, which the kernel does not take
        dtype = torch.get_autocast_dtype(query_THD.device.type)
        query_THD, key_TKD, value_TKD = (x.to(dtype) for x in (query_THD, key_TKD, value_TKD))
    out = varlen_attn(
        query_THD, key_TKD, value_TKD, ends, ends, max(lengths), max(lengths),
        scale=scale, window_size=(-1 if window is None else window - 1, 0), **extra,
    )  # fmt: skip
    assert isinstance(out, torch.Tensor)
    return out


@cache
def _takes_enable_gqa(kernel: Callable[..., Any]) -> bool:
    """Return True if a kernel must be told that heads share keys; before torch 2.12 it needs no argument."""
    return "enable_gqa" in signature(kernel).parameters


@lru_cache(maxsize=8)
def _ends(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return where each document ends, 0 first; one tensor for all layers of a batch."""
    return to_device(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device)


def varlen_unusable(config: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the kernel for all documents cannot be used for a model here, or None."""
    config = config.get_text_config()
    if device.type != "cuda":
        return "it needs an NVIDIA GPU"
    if dtype == torch.float32:
        return "it needs bf16 or fp16"
    if dropout := getattr(config, "attention_dropout", 0):
        return f"it has no dropout, and the model has attention_dropout={dropout}"
    heads, keys = config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(24, n, width, device=device, dtype=dtype, generator=generator).requires_grad_()
        for n in (heads, keys, keys)
    )
    lengths = (9, 15)
    window = 5 if getattr(config, "sliding_window", None) else None  # within the longer document
    results: list[list[torch.Tensor]] = []
    try:
        for attend in (varlen, _one_by_one):
            outs = [attend(q, k, v, lengths, None, None), attend(q, k, v, lengths, 0.3, window)]
            loss = torch.stack([out.float().square().sum() for out in outs]).sum()
            results.append([*outs, *torch.autograd.grad(loss, (q, k, v))])
    except (RuntimeError, ImportError, ValueError, TypeError, AssertionError) as error:  # each kernel in its own way
        return (str(error).splitlines() or [type(error).__name__])[0]
    for found, wanted in zip(*results, strict=True):
        if not (found.float() - wanted.float()).abs().max() <= 0.05 * wanted.float().abs().max():
            return "its result differs from attention document by document"
    return None


def _one_by_one(
    query_THD: torch.Tensor,
    key_TKD: torch.Tensor,
    value_TKD: torch.Tensor,
    lengths: tuple[int, ...],
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    """Do what `varlen` does, a call a document."""
    q, k, v = (x.transpose(0, 1)[None] for x in (query_THD, key_TKD, value_TKD))
    module = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], is_causal=True, training=False)
    return attention(_sdpa, module, q, k, v, None, lengths, window, scaling=scale)[0][0]


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


def _beyond(length: int, window: int | None) -> bool:
    """Return True if a document is longer than the model's attention window."""
    return window is not None and length > window


def _causal(query_BHTD: torch.Tensor, window: int | None) -> torch.Tensor:
    """Return what is added to the scores of a document: nothing behind a token and within the window, else -inf."""
    at_T = torch.arange(query_BHTD.shape[2], device=query_BHTD.device)
    behind_TT = at_T[:, None] - at_T[None, :]
    seen_TT = (behind_TT >= 0) & (behind_TT < (window or len(at_T)))
    return torch.zeros_like(seen_TT, dtype=query_BHTD.dtype).masked_fill_(~seen_TT, -torch.inf)[None, None]
