"""Which rows make which optimizer step: a pure function of (seed, step) and the rows' lengths.

There is no state to save: a run that is resumed asks for its next step. Nothing depends on the
number of loader processes, and ranks share a step without loss or repetition.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from sftx.seeds import key_of

Pack = tuple[int, ...]
"""Rows that count as one of a micro-batch's `batch_size`: one row, or with `packed` those of a pack."""
Batching = Literal["padding_free", "padded", "length_bucketed", "packed"]
BUCKET_STEPS = 32
"""Optimizer steps whose rows `length_bucketed` sorts by length together."""


@dataclass
class Plan:
    """The order of training."""

    lengths: Sequence[int] = field(repr=False)
    """Tokens of each row."""
    batching: Batching
    max_length: int
    sequences_per_step: int
    """Sequences of an optimizer step, over all ranks and micro-batches."""
    seed: int
    _epochs: dict[int, list[Pack]] = field(init=False, repr=False, default_factory=dict)

    @property
    def sequence_count(self) -> int:
        """Sequences of one pass over the rows; the same in every epoch."""
        return len(self._epoch(0))

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass; the last one of a pass may be smaller."""
        return math.ceil(self.sequence_count / self.sequences_per_step)

    def rows(self, step: int) -> list[int]:
        """Return the rows of a step (counted from 0)."""
        return [i for pack in self._packs(step) for i in pack]

    def micro_batches(self, step: int, batch_size: int) -> list[tuple[int, ...]]:
        """Return the rows of each micro-batch of a step, over all ranks."""
        return _micro_batches(self._packs(step), batch_size)

    def share(self, step: int, batch_size: int, world_size: int, rank: int) -> list[tuple[int, tuple[int, ...]]]:
        """Return (index, rows) of one rank's micro-batches; every rank gets equally many, some without rows."""
        return share(self._packs(step), batch_size, world_size, rank)

    def packing_waste(self) -> float:
        """Return the share of a pack that stays empty, on average; 0 where rows are not packed."""
        if self.batching != "packed":
            return 0.0
        return 1 - sum(self.lengths) / (self.sequence_count * self.max_length)

    def _packs(self, step: int) -> list[Pack]:
        epoch, within = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[within * self.sequences_per_step : (within + 1) * self.sequences_per_step]

    def _epoch(self, epoch: int) -> list[Pack]:
        """Return the packs of an epoch in their order; the last two requested are kept."""
        if epoch not in self._epochs:
            while len(self._epochs) > 1:
                self._epochs.pop(next(iter(self._epochs)))
            self._epochs[epoch] = self._ordered(epoch)
        return self._epochs[epoch]

    def _ordered(self, epoch: int) -> list[Pack]:
        generator = torch.Generator().manual_seed(key_of(self.seed, epoch))
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        return in_packs(order, self.lengths, self.batching, self.max_length, self.sequences_per_step, generator)


def in_packs(
    order: list[int],
    lengths: Sequence[int],
    batching: Batching,
    max_length: int,
    sequences_per_step: int,
    generator: torch.Generator,
) -> list[Pack]:
    """Return rows as packs, in the order of training; `order` is a shuffled one of the rows."""
    if not order:
        return []
    if batching == "packed":
        packs = pack(order, lengths, max_length)
        return [packs[i] for i in torch.randperm(len(packs), generator=generator).tolist()]
    if batching == "length_bucketed":
        order = _bucketed(order, lengths, sequences_per_step, generator)
    return [(i,) for i in order]


def share(packs: Sequence[Pack], batch_size: int, world_size: int, rank: int) -> list[tuple[int, tuple[int, ...]]]:
    """Return (index, rows) of one rank's micro-batches of a step, equally many on each rank, some without rows."""
    micro = _micro_batches(packs, batch_size)
    micro += [()] * (-len(micro) % world_size)
    return [(i, micro[i]) for i in range(rank, len(micro), world_size)]


def _micro_batches(packs: Sequence[Pack], batch_size: int) -> list[tuple[int, ...]]:
    groups = [packs[i : i + batch_size] for i in range(0, len(packs), batch_size)]
    return [tuple(i for pack in group for i in pack) for group in groups]


def _bucketed(order: list[int], lengths: Sequence[int], step_rows: int, generator: torch.Generator) -> list[int]:
    """Sort by length within spans of some steps, then shuffle the steps; a last, smaller step stays last."""
    span = BUCKET_STEPS * step_rows
    spans = (order[i : i + span] for i in range(0, len(order), span))
    ordered = [i for rows in spans for i in sorted(rows, key=lambda i: -lengths[i])]
    steps = [ordered[i : i + step_rows] for i in range(0, len(ordered), step_rows)]
    last = [steps.pop()] if len(steps[-1]) < step_rows else []
    shuffled = [steps[i] for i in torch.randperm(len(steps), generator=generator).tolist()]
    return [i for rows in shuffled + last for i in rows]


def pack(order: Sequence[int], lengths: Sequence[int], max_length: int) -> list[tuple[int, ...]]:
    """Fill packs of `max_length` tokens, longest rows first, each into the fullest pack that has room (best fit).

    `order` decides among rows of equal length, so that epochs pack differently and equally well.
    """
    packs: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    rooms = 0  # bit r is set when some pack has room for exactly r more tokens
    for row in sorted(order, key=lambda i: -lengths[i]):
        length = lengths[row]
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            number = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, number = max(max_length, length), len(packs)
            packs.append([])
        packs[number].append(row)
        left = room - length
        by_room.setdefault(left, []).append(number)
        rooms |= 1 << left
    return [tuple(p) for p in packs]
