"""Attention in blocks is attention, a document at a time."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch
import torch.nn.functional as F

from sftx.model.kernels import attention
from sftx.model.kernels import cpu_attention as blocks

WIDTH = 8


def inputs(tokens: int, heads: int, shared: int) -> list[torch.Tensor]:
    """Return queries, keys and values as a model hands them over: `[heads, tokens, width]`, tokens first in memory."""
    torch.manual_seed(0)
    return [torch.randn(tokens, n, WIDTH, dtype=torch.float32).transpose(0, 1) for n in (heads, shared, shared)]


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], scale: float | None) -> torch.Tensor:
    out = []
    for first, last in pairwise([0, *accumulate(lengths)]):
        parts = [x[None, :, first:last] for x in (q, k, v)]
        out.append(F.scaled_dot_product_attention(*parts, is_causal=True, scale=scale, enable_gqa=True)[0])
    return torch.cat(out, dim=1).transpose(0, 1)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("lengths", [[1], [5, 1, 12], [7, 20, 33], [64]], ids=str)
def test_result_and_gradients(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int], heads: int, shared: int, scale: float | None
) -> None:
    monkeypatch.setattr(blocks, "QUERIES", 6)
    monkeypatch.setattr(blocks, "KEPT", 20)
    blocks._blocks.cache_clear()
    tensors = [x.requires_grad_() for x in inputs(sum(lengths), heads, shared)]
    slope = torch.randn(sum(lengths), heads, WIDTH)
    found = blocks.attend(*tensors, lengths, scale)
    wanted = plain(*tensors, lengths, scale)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(out, tensors, slope) for out in (found, wanted)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    blocks._blocks.cache_clear()


def test_a_long_documents_probabilities_are_not_kept() -> None:
    def kept(length: int) -> int:
        q, k, v = (x.requires_grad_() for x in inputs(length, 2, 1))
        out = blocks.attend(q, k, v, [length], None)
        return sum(x.numel() for x in out.grad_fn.saved_tensors[3:] if x is not None)  # type: ignore[union-attr]

    assert kept(blocks.KEPT) > blocks.KEPT**2
    assert kept(blocks.KEPT + 1) == 0


@pytest.mark.parametrize(
    ("kwargs", "dtype", "expected"),
    [({}, torch.float32, True), ({}, torch.bfloat16, False), ({"dropout": 0.1}, torch.float32, False),
     ({"sliding_window": 4}, torch.float32, False), ({"sliding_window": 9}, torch.float32, True)],
)  # fmt: skip
def test_used_where_it_is_the_same(
    monkeypatch: pytest.MonkeyPatch, kwargs: dict[str, float], dtype: torch.dtype, expected: bool
) -> None:
    calls = []
    real = blocks.attend
    monkeypatch.setattr(blocks, "attend", lambda *given: calls.append(1) or real(*given))
    q, k, v = (x[None].to(dtype) for x in inputs(14, 4, 2))
    module = torch.nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    out, _ = attention.attention(attention._sdpa, module, q, k, v, None, [9, 5], **kwargs)  # type: ignore[arg-type]
    assert out.shape == (1, 14, 4, WIDTH)
    assert bool(calls) == expected
