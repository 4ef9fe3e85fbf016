"""Batches: how the rows of a micro-batch are laid out, and the stream of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from sftx.data.plan import Plan
from sftx.data.rows import Row

IGNORE = -100
"""Target of a position that carries no loss, as torch's cross entropy spells it."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch: rows padded to one width `[B, T]`, or laid end to end `[1, T]`.

    `targets_BT` is the next token where it is learned and `weights_BT` what it weighs; `place_BT` says
    which of `rows` a position belongs to. Laid end to end, `lengths` holds the rows' lengths and
    `positions_BT` begins anew with each row.
    """

    ids_BT: torch.Tensor
    targets_BT: torch.Tensor
    weights_BT: torch.Tensor
    place_BT: torch.Tensor
    rows: tuple[int, ...]
    """Indices of its rows in the corpus."""
    index: int
    """Its place among the micro-batches of the step, over all ranks."""
    tokens: int
    """Real tokens; padding is never counted."""
    positions_BT: torch.Tensor | None = None
    lengths: tuple[int, ...] | None = None

    def digest(self) -> str:
        """Return a hash of tokens and targets, to compare two runs by."""
        digest = hashlib.sha256()
        for tensor in (self.ids_BT, self.targets_BT, self.weights_BT):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()[:16]


def collate(rows: Sequence[Row], indices: tuple[int, ...], *, flat: bool, pad_id: int, index: int = 0) -> Batch:
    """Lay rows end to end (`flat`), or pad them on the right; a batch without rows is one token without loss."""
    chosen = [rows[i] for i in indices]
    lengths = [len(r.ids_T) for r in chosen] or [1]
    total = sum(len(r.ids_T) for r in chosen)
    shape = (1, sum(lengths)) if flat else (len(lengths), max(lengths))
    ids = torch.full(shape, pad_id, dtype=torch.long)
    targets = torch.full(shape, IGNORE, dtype=torch.long)
    weights, place = torch.zeros(shape), torch.zeros(shape, dtype=torch.long)
    positions = torch.zeros(shape, dtype=torch.long) if flat else None
    start = 0
    for number, row in enumerate(chosen):
        b, t, length = (0, start, len(row.ids_T)) if flat else (number, 0, len(row.ids_T))
        here, before_last = slice(t, t + length), slice(t, t + length - 1)
        ids_T, weights_T = torch.from_numpy(row.ids_T.astype("int64")), torch.from_numpy(row.weights_T.copy())
        ids[b, here] = ids_T
        targets[b, before_last] = ids_T[1:].masked_fill(weights_T[1:] <= 0, IGNORE)
        weights[b, before_last] = weights_T[1:]
        place[b, here] = number
        if positions is not None:
            positions[b, here] = torch.arange(length)
        start += length
    return Batch(ids, targets, weights, place, indices, index, total, positions, tuple(lengths) if flat else None)


class _MicroBatches(Dataset[Batch]):
    def __init__(self, rows: Sequence[Row], flat: bool, pad_id: int) -> None:
        self.rows, self.flat, self.pad_id = rows, flat, pad_id

    def __getitem__(self, item: tuple[int, tuple[int, ...]]) -> Batch:
        index, indices = item
        return collate(self.rows, indices, flat=self.flat, pad_id=self.pad_id, index=index)


class _Order(Sampler[tuple[int, tuple[int, ...]]]):
    def __init__(self, plan: Plan, rank: int, first_step: int, last_step: int) -> None:
        self.plan, self.rank, self.steps = plan, rank, range(first_step, last_step)

    def __iter__(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        return (item for step in self.steps for item in self.plan.share(step, self.rank))


def stream(
    rows: Sequence[Row],
    plan: Plan,
    *,
    rank: int,
    first_step: int,
    last_step: int,
    flat: bool,
    pad_id: int,
    workers: int,
) -> Iterator[list[Batch]]:
    """Yield this rank's micro-batches of each step from `first_step` up to `last_step` (exclusive)."""
    loader = DataLoader(
        _MicroBatches(rows, flat, pad_id),
        sampler=_Order(plan, rank, first_step, last_step),
        batch_size=None,
        num_workers=workers,
        generator=torch.Generator().manual_seed(plan.seed),  # the global generator is left alone
    )
    batches = iter(loader)
    for step in range(first_step, last_step):
        yield [next(batches) for _ in plan.share(step, rank)]
