"""Causal attention on a CPU in plain matrix products: a block of queries at a time, on the keys up to it.

What torch's own kernel computes, for rows as long as those of instruction data in two thirds of its time: a block is
small enough to stay near the processor, and what a causal mask would hide is hardly computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

QUERIES = 96
"""Of a block, at most."""
KEPT = 256
"""Tokens of a document whose probabilities are kept for the backward pass; of a longer one they are made again. Those
of a shorter one take less memory than its queries, keys and values."""


class Block(NamedTuple):
    """Queries `[start, end)` of the document that begins at `first`; `ends` it: its last block."""

    first: int
    start: int
    end: int
    ends: bool
    kept: bool

    @property
    def seen(self) -> slice:
        """The keys that its queries see, those of the last one."""
        return slice(self.first, self.end)


def usable(query: torch.Tensor) -> bool:
    """Return True if this is what torch's kernel is slow at."""
    return query.device.type == "cpu" and query.dtype == torch.float32 and torch.backends.mkl.is_available()


def attend(
    query_HTD: torch.Tensor, key_KTD: torch.Tensor, value_KTD: torch.Tensor, lengths: Sequence[int], scale: float | None
) -> torch.Tensor:
    """Attend within each of the documents that lie end to end; `[T, H, D]`. `H` heads share `K` of keys and values."""
    scale = query_HTD.shape[-1] ** -0.5 if scale is None else scale
    out: torch.Tensor = _Attention.apply(query_HTD, key_KTD, value_KTD, _blocks(tuple(lengths)), scale)
    return out


@lru_cache(maxsize=8)
def _blocks(lengths: tuple[int, ...]) -> tuple[Block, ...]:
    return tuple(_cut(lengths))


def _cut(lengths: tuple[int, ...]) -> Iterator[Block]:
    first = 0
    for length in lengths:
        size = -(-length // -(-length // QUERIES))  # equal ones
        for start in range(0, length, size):
            end = min(start + size, length)
            yield Block(first, first + start, first + end, end == length, length <= KEPT)
        first += length


class _Attention(torch.autograd.Function):
    """`softmax(scale * Q K' + mask) V`, document by document; a group's heads are rows one after the other."""

    @staticmethod
    def forward(
        ctx: Any, q_HTD: torch.Tensor, k_KTD: torch.Tensor, v_KTD: torch.Tensor, blocks: Sequence[Block], scale: float
    ) -> torch.Tensor:
        group = len(q_HTD) // len(k_KTD)
        q_KRD = _grouped(q_HTD, group, scale)  # R: T * G
        out_KRD = torch.empty_like(q_KRD)
        kept: list[torch.Tensor | None] = []
        for block, queries, out in zip(blocks, *_by_block((q_KRD, out_KRD), blocks, group), strict=True):
            weights = _probabilities(queries, k_KTD[:, block.seen], block)
            torch.bmm(weights, v_KTD[:, block.seen], out=out)
            kept.append(weights if block.kept else None)
        ctx.save_for_backward(q_KRD, k_KTD, v_KTD, *kept)
        ctx.blocks, ctx.scale = blocks, scale
        return _ungrouped(out_KRD, group).transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_THD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q_KRD, k_KTD, v_KTD, *kept = ctx.saved_tensors
        group = q_KRD.shape[1] // k_KTD.shape[1]
        grad_KRD = _grouped(grad_THD.transpose(0, 1), group)
        of_q_KRD = torch.empty_like(q_KRD)
        of_k_KTD, of_v_KTD = torch.empty_like(k_KTD), torch.empty_like(v_KTD)
        parts = _by_block((q_KRD, grad_KRD, of_q_KRD), ctx.blocks, group)
        for block, weights, queries, grad, of_queries in reversed(list(zip(ctx.blocks, kept, *parts, strict=True))):
            seen, keys = block.seen, k_KTD[:, block.seen]
            if weights is None:
                weights = _probabilities(queries, keys, block)
            slope = torch.bmm(grad, v_KTD[:, seen].transpose(1, 2))
            slope = torch._softmax_backward_data(slope, weights, -1, slope.dtype)
            torch.bmm(slope, keys, out=of_queries)
            beta = 0 if block.ends else 1  # the first to be looked at is the one that sees all keys
            of_k_KTD[:, seen].baddbmm_(slope.transpose(1, 2), queries, beta=beta)
            of_v_KTD[:, seen].baddbmm_(weights.transpose(1, 2), grad, beta=beta)
        return _ungrouped(of_q_KRD, group, ctx.scale), of_k_KTD, of_v_KTD, None, None


def _by_block(
    tensors_KRD: Sequence[torch.Tensor], blocks: Sequence[Block], group: int
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Return of each tensor the rows of each block: of its queries, so many heads each."""
    sizes = [(block.end - block.start) * group for block in blocks]
    return (x.split(sizes, 1) for x in tensors_KRD)


def _grouped(x_HTD: torch.Tensor, group: int, scale: float = 1.0) -> torch.Tensor:
    """Return a scaled copy in which the heads that share keys are one after the other for each token: `[K, T * G, D]`.

    One pass: scaling after copying would be another.
    """
    out = x_HTD.new_empty(len(x_HTD) // group, x_HTD.shape[1], group, x_HTD.shape[2])
    return torch.mul(x_HTD.unflatten(0, (-1, group)).transpose(1, 2), scale, out=out).flatten(1, 2)


def _ungrouped(x_KRD: torch.Tensor, group: int, scale: float = 1.0) -> torch.Tensor:
    """Return a scaled copy `[H, T, D]`, as a model has it: tokens first in memory."""
    x_TKGD = x_KRD.unflatten(1, (-1, group)).transpose(0, 1)
    out = torch.mul(x_TKGD, scale, out=x_KRD.new_empty(x_TKGD.shape))
    return out.flatten(1, 2).transpose(0, 1)


def _probabilities(queries_KRD: torch.Tensor, keys_KTD: torch.Tensor, block: Block) -> torch.Tensor:
    """Return the softmax of the scores, `[K, rows, keys]`: nothing behind a token."""
    scores = torch.bmm(queries_KRD, keys_KTD.transpose(1, 2))
    count = block.end - block.start
    scores.unflatten(1, (count, -1))[..., -count:] += _hidden(count)
    return torch.softmax(scores, -1)


@lru_cache(maxsize=2 * QUERIES)
def _hidden(count: int) -> torch.Tensor:
    """Return what is added to the scores of tokens among themselves, `[tokens, 1, tokens]`."""
    return torch.full((count, count), -torch.inf).triu_(1)[:, None]
