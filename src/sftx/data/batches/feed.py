"""What feeds a trial: its optimizer steps, one after the other, each with this rank's micro-batches.

A feed is given the step at which it begins. What it hands out is a pure function of (data, seed, step), so
that a resumed run is fed as if it had never stopped.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from sftx.data.batches.collate import Batch, collate
from sftx.data.batches.plan import Plan
from sftx.data.encode.row import Row
from sftx.data.store.rows import Rows
from sftx.processes import serve_parent


@dataclass(frozen=True)
class Step:
    """One optimizer step; what is not stated to be of this rank is of all ranks together."""

    batches: list[Batch]
    """This rank's micro-batches."""
    weight: float
    """The sum of the weights of the tokens that carry loss."""
    supervised_tokens: int
    tokens: int
    origins: list[str]
    """`file:line` of each row."""
    epoch: float
    """Passes over the corpus once this step is made; whole ones only while its length is not known."""
    cursor: dict[str, Any] | None = None
    """Where a feed that cannot find a step by its number goes on after this one; JSON."""
    truncated: tuple[str, ...] = ()
    """Rows that lost tokens, and ..."""
    left_out: tuple[str, ...] = ()
    """... records that gave no row, as `file:line: why`, where that was not known before training."""


@dataclass(frozen=True)
class Layout:
    """How rows become tensors, and for whom."""

    padding_free: bool
    """Rows are concatenated instead of padded."""
    pad_id: int
    rank: int
    world_size: int
    batch_size: int
    """Sequences (rows, or packs of them) of a micro-batch."""

    def batch(self, rows: Sequence[Row], indices: tuple[int, ...], index: int) -> Batch:
        """Return a micro-batch of some rows."""
        return collate(rows, indices, padding_free=self.padding_free, pad_id=self.pad_id, index=index)


class Feed(Protocol):
    """Where a trial's steps come from."""

    sequences: int | None
    """Rows, or packs of them, of one pass; None when that is not known."""

    def steps(self, first: int, last: int, cursor: dict[str, Any] | None, layout: Layout) -> Generator[Step]:
        """Yield the steps from `first` up to `last` (exclusive); `cursor` is that of the step before.

        Closing the generator ends the processes that it started.
        """
        ...


class PlannedFeed:
    """Feeds rows that are all at hand, as a plan orders them."""

    def __init__(self, rows: Rows, plan: Plan, workers: int) -> None:
        self.rows, self.plan, self._workers = rows, plan, workers
        self.sequences: int | None = plan.sequence_count

    def steps(self, first: int, last: int, cursor: dict[str, Any] | None, layout: Layout) -> Generator[Step]:
        """Yield steps; a plan finds each by its number."""
        loader = DataLoader(
            _MicroBatches(self.rows, layout),
            sampler=_Order(self.plan, layout, first, last),
            batch_size=None,
            num_workers=self._workers,
            worker_init_fn=serve_parent,
            generator=torch.Generator().manual_seed(self.plan.seed),  # the global generator is left alone
        )
        batches = iter(loader)
        for step in range(first, last):
            rows = self.plan.rows(step)
            mine = self.plan.share(step, layout.batch_size, layout.world_size, layout.rank)
            yield Step(
                batches=[next(batches) for _ in mine],
                weight=float(self.rows.loss_weights[rows].sum()),
                supervised_tokens=int(self.rows.supervised[rows].sum()),
                tokens=int(self.rows.lengths[rows].sum()),
                origins=[self.rows.origin(i) for i in rows],
                epoch=(step + 1) / self.plan.steps_per_epoch,
            )


class _MicroBatches(Dataset[Batch]):
    def __init__(self, rows: Rows, layout: Layout) -> None:
        self.rows, self.layout = rows, layout

    def __getitem__(self, item: tuple[int, tuple[int, ...]]) -> Batch:
        index, indices = item
        return self.layout.batch(self.rows, indices, index)


class _Order(Sampler[tuple[int, tuple[int, ...]]]):
    def __init__(self, plan: Plan, layout: Layout, first_step: int, last_step: int) -> None:
        self.plan, self.layout, self.steps = plan, layout, range(first_step, last_step)

    def __iter__(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        at = self.layout
        return (item for s in self.steps for item in self.plan.share(s, at.batch_size, at.world_size, at.rank))
