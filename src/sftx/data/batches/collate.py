"""Batches: how the rows of a micro-batch are laid out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sftx.data.encode.row import Row

IGNORE = -100
"""Target of a position that carries no loss, as torch's cross entropy spells it."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch: rows padded to one width `[B, T]`, or concatenated `[1, T]`.

    `targets_BT` is the next token where it is supervised and `weights_BT` what it weighs; `row_index_BT` says
    which of its rows a position belongs to. Concatenated, `positions_BT` begins anew with each row.
    """

    ids_BT: torch.Tensor
    targets_BT: torch.Tensor
    weights_BT: torch.Tensor
    row_index_BT: torch.Tensor
    origins: tuple[str, ...]
    """`file:line` of each row."""
    index: int
    """Its number among the micro-batches of the step, over all ranks."""
    tokens: int
    """Real tokens; padding is never counted."""
    lengths: tuple[int, ...]
    """Tokens of each row; a batch without rows is one token."""
    positions_BT: torch.Tensor | None = None

    @property
    def supervised_tokens(self) -> int:
        """Tokens that carry loss."""
        return int((self.targets_BT != IGNORE).sum())

    @property
    def longest(self) -> int:
        """Place of its longest row among its rows."""
        return self.lengths.index(max(self.lengths))

    def digest(self) -> str:
        """Return a hash of tokens and targets, to compare two runs by."""
        digest = hashlib.sha256()
        for tensor in (self.ids_BT, self.targets_BT, self.weights_BT):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()[:16]


def collate(rows: Sequence[Row], indices: tuple[int, ...], *, padding_free: bool, pad_id: int, index: int = 0) -> Batch:
    """Concatenate rows (`padding_free`), or pad them on the right; a batch without rows is one token without loss."""
    chosen = [rows[i] for i in indices]
    lengths = [len(r.ids_T) for r in chosen] or [1]
    total = sum(len(r.ids_T) for r in chosen)
    shape = (1, sum(lengths)) if padding_free else (len(lengths), max(lengths))
    ids = torch.full(shape, pad_id, dtype=torch.long)
    targets = torch.full(shape, IGNORE, dtype=torch.long)
    weights, row_index = torch.zeros(shape), torch.zeros(shape, dtype=torch.long)
    positions = torch.zeros(shape, dtype=torch.long) if padding_free else None
    start = 0
    for number, row in enumerate(chosen):
        b, t, length = (0, start, len(row.ids_T)) if padding_free else (number, 0, len(row.ids_T))
        here, before_last = slice(t, t + length), slice(t, t + length - 1)
        ids_T, weights_T = torch.from_numpy(row.ids_T.astype("int64")), torch.from_numpy(row.weights_T.copy())
        ids[b, here] = ids_T
        targets[b, before_last] = ids_T[1:].masked_fill(weights_T[1:] <= 0, IGNORE)
        weights[b, before_last] = weights_T[1:]
        row_index[b, here] = number
        if positions is not None:
            positions[b, here] = torch.arange(length)
        start += length
    origins = tuple(r.origin for r in chosen)
    return Batch(ids, targets, weights, row_index, origins, index, total, tuple(lengths), positions)
