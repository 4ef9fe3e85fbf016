"""Streaming: a shuffled pass over records, dealt to ranks, that goes on at the very row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftx.data.record import Record, pair
from sftx.data.rows import Row
from sftx.data.streaming import StreamRows, reader_of


def corpus(count: int) -> list[Record]:
    return [pair("c", f"q{i}", f"a{i}", "corpus.jsonl", i, {}) for i in range(count)]


def encode(records: Sequence[Record]) -> list[list[Row] | str]:
    """Record i gives i % 3 rows; none is a reason."""

    def one(record: Record) -> list[Row] | str:
        ids = [np.array([record.line, part], dtype=np.int32) for part in range(record.line % 3)]
        return [Row(i, np.ones(2, np.float32), "c", record.origin, 2) for i in ids] or "too long"

    return [one(record) for record in records]


def seen(rows: Iterator[Row]) -> list[tuple[int, int]]:
    return [(int(row.ids_T[0]), int(row.ids_T[1])) for row in rows]


def everything(count: int) -> Counter[tuple[int, int]]:
    return Counter((i, part) for i in range(count) for part in range(i % 3))


@given(
    count=st.integers(2, 300),
    window=st.integers(1, 80),
    world=st.integers(1, 5),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_nothing_is_lost_or_repeated_over_the_ranks(count: int, window: int, world: int, seed: int, epoch: int) -> None:
    skipped: list[Any] = []
    given_out: Counter[tuple[int, int]] = Counter()
    for rank in range(world):
        stream = StreamRows(
            reader_of(corpus(count)), encode, seed=seed, epoch=epoch, rank=rank, world_size=world,
            window=window, on_skip=lambda record, reason: skipped.append((record.line, reason)),
        )  # fmt: skip
        given_out.update(seen(stream))
    assert given_out == everything(count)
    assert sorted(skipped) == [(i, "too long") for i in range(0, count, 3)]


@given(count=st.integers(5, 150), window=st.integers(1, 60), world=st.integers(1, 3), stop=st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_it_goes_on_at_the_very_row(count: int, window: int, world: int, stop: int) -> None:
    def fresh() -> StreamRows:
        return StreamRows(
            reader_of(corpus(count)), encode, seed=3, epoch=1, rank=world - 1, world_size=world, window=window
        )

    whole = seen(fresh())
    stream = fresh()
    before = [next(stream) for _ in range(min(stop, len(whole)))]
    state = tuple(stream.state())
    assert len(state) == 2
    assert all(type(n) is int for n in state)
    other = fresh()
    other.restore(state)  # type: ignore[arg-type]
    assert seen(iter(before)) + seen(other) == whole


def test_a_resumed_stream_reads_from_its_window_on() -> None:
    opened: list[int] = []
    records = corpus(1000)

    def reader(start: int) -> Iterator[Record]:
        opened.append(start)
        return reader_of(records)(start)

    stream = StreamRows(reader, encode, seed=0, window=50)
    for _ in range(800):
        next(stream)
    state = stream.state()
    assert state.record > 500
    stream.restore(state)
    next(stream)
    assert opened[0] == 0
    assert state.record - 50 < opened[1] <= state.record


def test_every_epoch_and_seed_has_its_own_order_and_its_own_windows() -> None:
    def order(seed: int, epoch: int) -> list[tuple[int, int]]:
        return seen(StreamRows(reader_of(corpus(400)), encode, seed=seed, epoch=epoch, window=40))

    orders = [order(0, 0), order(0, 1), order(1, 0)]
    assert len({tuple(o) for o in orders}) == 3
    assert order(0, 1) == orders[1]
    neighbours = [{i for i, _ in o[:30]} for o in orders]  # records that come first, so in the first window
    assert len({max(n) for n in neighbours}) > 1
    assert all(max(n) < 2 * 40 for n in neighbours), "the shuffle reaches no further than its windows"
    assert seen(StreamRows(reader_of(corpus(90)), encode, seed=5, window=1)) == sorted(everything(90))


def test_a_pass_may_be_empty() -> None:
    for count in (0, 1):
        with pytest.raises(StopIteration):
            next(StreamRows(reader_of(corpus(count)), encode, seed=0))
