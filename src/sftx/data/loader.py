"""Rows to batches: which rows make which step is a pure function of (seed, epoch, step)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from sftx.data.rows import Row
from sftx.model.dropout import key_of

IGNORE = -100
"""Target of a position that carries no loss, as torch's cross entropy spells it."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch: `ids_BT` int64, right-padded; `targets_BT` the next token where it is learned."""

    ids_BT: torch.Tensor
    targets_BT: torch.Tensor
    rows: tuple[int, ...]
    """Indices of its rows in the corpus."""
    index: int
    """Its place among the micro-batches of the step, over all ranks."""
    tokens: int
    """Real tokens; padding is never counted."""


@dataclass(frozen=True)
class Plan:
    """Which rows make which optimizer step."""

    row_count: int
    batch_size: int
    accumulation: int
    world_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass; the last one of a pass may be smaller."""
        return math.ceil(self.row_count / self.rows_per_step)

    @property
    def rows_per_step(self) -> int:
        """Sequences per optimizer step, over all ranks and micro-batches."""
        return self.batch_size * self.accumulation * self.world_size

    def rows(self, step: int) -> list[int]:
        """Return the rows of a step (counted from 0)."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = _order(self.seed, epoch, self.row_count)
        return order[within * self.rows_per_step : (within + 1) * self.rows_per_step]

    def micro_batches(self, step: int) -> list[tuple[int, ...]]:
        """Return the rows of each micro-batch of a step, over all ranks."""
        rows = self.rows(step)
        return [tuple(rows[i : i + self.batch_size]) for i in range(0, len(rows), self.batch_size)]

    def share(self, step: int, rank: int) -> list[tuple[int, tuple[int, ...]]]:
        """Return (index, rows) of one rank's micro-batches; every rank gets equally many, some without rows."""
        micro = self.micro_batches(step)
        each = math.ceil(len(micro) / self.world_size)
        micro += [()] * (each * self.world_size - len(micro))
        return [(i, micro[i]) for i in range(rank, len(micro), self.world_size)]


@lru_cache(maxsize=8)
def _order(seed: int, epoch: int, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(key_of(seed, epoch))
    return torch.randperm(count, generator=generator).tolist()


def collate(rows: Sequence[Row], indices: tuple[int, ...], pad_id: int, index: int = 0) -> Batch:
    """Pad rows on the right and shift the targets; causal attention never looks at right padding."""
    width = max((len(rows[i].ids_T) for i in indices), default=1)
    ids_BT = torch.full((max(1, len(indices)), width), pad_id, dtype=torch.long)
    targets_BT = torch.full_like(ids_BT, IGNORE)
    for b, i in enumerate(indices):
        row = rows[i]
        ids_T = torch.from_numpy(row.ids_T.astype("int64"))
        ids_BT[b, : len(ids_T)] = ids_T
        next_T = ids_T[1:].masked_fill(~torch.from_numpy(row.supervised_T[1:]), IGNORE)
        targets_BT[b, : len(next_T)] = next_T
    return Batch(ids_BT, targets_BT, indices, index, sum(len(rows[i].ids_T) for i in indices))


class _MicroBatches(Dataset[Batch]):
    def __init__(self, rows: Sequence[Row], pad_id: int) -> None:
        self.rows, self.pad_id = rows, pad_id

    def __getitem__(self, item: tuple[int, tuple[int, ...]]) -> Batch:
        index, indices = item
        return collate(self.rows, indices, self.pad_id, index)


class _Order(Sampler[tuple[int, tuple[int, ...]]]):
    def __init__(self, plan: Plan, rank: int, first_step: int, last_step: int) -> None:
        self.plan, self.rank, self.steps = plan, rank, range(first_step, last_step)

    def __iter__(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        return (item for step in self.steps for item in self.plan.share(step, self.rank))


def stream(
    rows: Sequence[Row], plan: Plan, *, rank: int, first_step: int, last_step: int, pad_id: int, workers: int
) -> Iterator[list[Batch]]:
    """Yield this rank's micro-batches of each step from `first_step` up to `last_step` (exclusive)."""
    loader = DataLoader(
        _MicroBatches(rows, pad_id),
        sampler=_Order(plan, rank, first_step, last_step),
        batch_size=None,
        num_workers=workers,
        generator=torch.Generator().manual_seed(plan.seed),  # the global generator is left alone
    )
    batches = iter(loader)
    for step in range(first_step, last_step):
        yield [next(batches) for _ in plan.share(step, rank)]
