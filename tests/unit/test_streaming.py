"""Streaming: a shuffled pass over records, tokenised as it goes, that goes on at the very row."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sftx.data.batches.feed import Layout, Step
from sftx.data.batches.plan import Batching
from sftx.data.batches.streaming import Reader, StreamedFeed, StreamOrder
from sftx.data.encode.row import Row
from sftx.data.records.record import Record, pair
from sftx.errors import DataError

ONE = Layout(padding_free=True, pad_id=0, rank=0, world_size=1, batch_size=2)
ENDLESS = 10**9


def corpus(*counts: int, opened: list[int] | None = None, bad: int = 0, limit: int | None = None) -> Reader:
    """Files of so many records each; of record number n the question is n. `bad` rows stand after each record."""

    def file(number: int, first: int, count: int) -> Iterator[Record | str]:
        if opened is not None:
            opened.append(number)
        for i in range(first, first + count):
            yield pair("c", f"q{i}", f"a{i}", f"{number}.jsonl", i, {})
            yield from [f"{number}.jsonl:{i}: is not sound"] * bad

    starts = np.cumsum([0, *counts])
    return Reader([lambda n=n, c=c: file(n, int(starts[n]), c) for n, c in enumerate(counts)], limit)


def encode(records: Sequence[Record]) -> list[list[Row] | str]:
    """Record i gives i % 3 rows of 2 + i % 7 tokens; none is a reason."""

    def one(record: Record) -> list[Row] | str:
        length = 2 + record.line % 7
        ids = [np.array([record.line, part, *[5] * (length - 2)], dtype=np.int32) for part in range(record.line % 3)]
        return [Row(i, np.ones(length, np.float32), "c", record.origin, length) for i in ids] or "too long"

    return [one(record) for record in records]


def feed_of(
    reader: Reader, *, seed: int = 0, window: int = 50, batching: Batching = "padding_free", step: int = 4,
    workers: int = 0,
) -> StreamedFeed:  # fmt: skip
    return StreamedFeed(reader, encode, StreamOrder(seed, window, batching, 32, step), workers)


def steps_of(feed: StreamedFeed, count: int, cursor: dict[str, Any] | None = None, layout: Layout = ONE) -> list[Step]:
    return list(feed.steps(0, count, cursor, layout))


def one_pass(feed: StreamedFeed, epoch: int = 0) -> list[Step]:
    """The steps of one pass."""
    found = []
    for step in feed.steps(0, ENDLESS, {"epoch": epoch, "record": 0, "pack": 0, "counts": []}, ONE):
        assert step.cursor is not None
        ends = step.cursor | {"counts": []} == {"epoch": epoch + 1, "record": 0, "pack": 0, "counts": []}
        if step.cursor["epoch"] == epoch or ends:
            found.append(step)
        if step.cursor["epoch"] > epoch:
            return found
    raise AssertionError("a stream has no end")


def rows_of(steps: Sequence[Step]) -> list[tuple[int, int]]:
    """The first two tokens of each row: number of the record, part."""
    found = []
    for batch in (b for s in steps for b in s.batches):
        starts = np.cumsum([0, *batch.lengths])[:-1] if batch.origins else []
        found += [(int(batch.ids_BT[0, t]), int(batch.ids_BT[0, t + 1])) for t in starts]
    return found


def everything(count: int) -> Counter[tuple[int, int]]:
    return Counter((i, part) for i in range(count) for part in range(i % 3))


SIZES = {
    "count": st.integers(2, 300), "window": st.integers(1, 80), "seed": st.integers(0, 5), "epoch": st.integers(0, 3),
    "batching": st.sampled_from(["padding_free", "padded", "length_bucketed", "packed"]),
}  # fmt: skip


@given(**SIZES)
@example(count=55, window=2, seed=0, epoch=0, batching="length_bucketed")
@settings(max_examples=60, deadline=None)
def test_a_pass_holds_each_row_once(count: int, window: int, seed: int, epoch: int, batching: Batching) -> None:
    feed = feed_of(corpus(count), window=window, seed=seed, batching=batching)
    steps = one_pass(feed, epoch)
    assert Counter(rows_of(steps)) == everything(count)
    with_next = steps_of(feed, len(steps) + 1, {"epoch": epoch, "record": 0, "pack": 0, "counts": []})
    told = [reason for s in with_next for reason in s.left_out]  # of the last records beside the step that comes next
    assert sorted(told) == (sorted(f"0.jsonl:{i}: too long" for i in range(0, count, 3)) if epoch == 0 else [])
    assert all(s.tokens == sum(b.tokens for b in s.batches) for s in steps)


@given(count=st.integers(2, 200), world=st.integers(1, 5), window=st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_ranks_share_the_steps_of_one_process(count: int, world: int, window: int) -> None:
    def of_rank(rank: int) -> list[Step]:
        return steps_of(feed_of(corpus(count), window=window), 7, layout=Layout(True, 0, rank, world, 2))

    alone, together = of_rank(0) if world == 1 else steps_of(feed_of(corpus(count), window=window), 7), []
    for at in zip(*(of_rank(rank) for rank in range(world)), strict=True):
        assert len({(s.weight, s.tokens, s.supervised_tokens, s.epoch, str(s.cursor)) for s in at}) == 1
        assert len({len(s.batches) for s in at}) == 1, "every rank has as many micro-batches"
        together.append(sorted((b.index, b.digest()) for s in at for b in s.batches if b.origins))
    assert together == [[(b.index, b.digest()) for b in s.batches] for s in alone]


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4).filter(lambda s: sum(s) > 2),
    stop=st.integers(1, 60), batching=SIZES["batching"], window=SIZES["window"],
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_it_goes_on_at_the_very_row(sizes: list[int], stop: int, batching: Batching, window: int) -> None:
    """In any pass, through JSON, told to a reader that has seen nothing."""

    def fresh() -> StreamedFeed:
        return feed_of(corpus(*sizes, bad=1), window=window, batching=batching, seed=3)

    whole = steps_of(fresh(), stop + 10)
    cursor = json.loads(json.dumps(whole[stop - 1].cursor))
    for goes_on, step in zip(steps_of(fresh(), 10, cursor), whole[stop:], strict=True):
        assert [b.digest() for b in goes_on.batches] == [b.digest() for b in step.batches]
        assert (goes_on.origins, goes_on.cursor, goes_on.epoch) == (step.origins, step.cursor, step.epoch)
        assert (goes_on.left_out, goes_on.truncated) == (step.left_out, step.truncated), "nothing is told twice"


def test_what_is_left_out_is_told_once() -> None:
    steps = steps_of(feed_of(corpus(90, bad=1), window=40), 60)
    told = Counter(reason for s in steps for reason in s.left_out)
    assert set(told.values()) == {1}
    assert sum("not sound" in reason for reason in told) == 90
    assert sum("too long" in reason for reason in told) == 30


def test_a_resumed_stream_opens_no_file_that_is_behind_it() -> None:
    steps = steps_of(feed_of(corpus(100, 100, 100, 100), window=20), 70)
    cursor = steps[-1].cursor
    assert cursor is not None
    assert cursor["record"] > 210
    opened: list[int] = []
    steps_of(feed_of(corpus(100, 100, 100, 100, opened=opened), window=20), 1, cursor)
    assert opened == [2]


def test_every_epoch_and_seed_has_its_own_order_and_its_own_windows() -> None:
    def order(seed: int, epoch: int) -> list[tuple[int, int]]:
        return rows_of(one_pass(feed_of(corpus(400), seed=seed, window=40), epoch))

    orders = [order(0, 0), order(0, 1), order(1, 0)]
    assert len({tuple(o) for o in orders}) == 3
    assert order(0, 1) == orders[1]
    neighbours = [{i for i, _ in o[:30]} for o in orders]  # records that come first, so in the first window
    assert len({max(n) for n in neighbours}) > 1
    assert all(max(n) < 2 * 40 for n in neighbours), "the shuffle reaches no further than its windows"
    assert rows_of(one_pass(feed_of(corpus(90), window=1))) == sorted(everything(90))


def test_an_epoch_is_a_share_once_its_length_is_known() -> None:
    epochs = [s.epoch for s in steps_of(feed_of(corpus(20, 20), window=10), 30)]
    assert epochs == sorted(epochs)
    assert epochs[0] == 0
    assert {1.0, 2.0} <= set(epochs)
    assert any(1 < e < 2 for e in epochs)


@pytest.mark.parametrize("limit", [1, 7, 50, 51, 100, 1000])
def test_a_limit_counts_records(limit: int) -> None:
    reader = corpus(50, 50, limit=limit)
    for _ in range(2):
        found = [r.line for r in reader.records(0) if not isinstance(r, str)]
        assert found == list(range(min(limit, 100)))
    assert reader.total == min(limit, 100)


def test_packs_are_full_and_buckets_alike() -> None:
    packed = steps_of(
        feed_of(corpus(9000), window=3000, batching="packed", step=1), 900, layout=replace(ONE, batch_size=1)
    )
    assert sum(s.tokens for s in packed) / (900 * 32) > 0.98
    bucketed = steps_of(
        feed_of(corpus(2000), window=600, batching="length_bucketed", step=8), 40, layout=replace(ONE, batch_size=8)
    )
    padding = [max(b.lengths or ()) * len(b.lengths or ()) - b.tokens for s in bucketed for b in s.batches]
    assert sum(padding) < 0.05 * sum(s.tokens for s in bucketed)


def test_a_process_of_its_own_makes_the_same_steps() -> None:
    steps = [list(islice(feed_of(corpus(90), workers=w).steps(0, 40, None, ONE), 40)) for w in (0, 3)]
    assert [[b.digest() for b in s.batches] for s in steps[0]] == [[b.digest() for b in s.batches] for s in steps[1]]
    assert [s.cursor for s in steps[0]] == [s.cursor for s in steps[1]]


def test_a_corpus_without_a_row_to_learn_is_refused() -> None:
    with pytest.raises(DataError, match=r"no record of the whole corpus can be trained on. The first: 0.jsonl:0"):
        steps_of(feed_of(corpus(1)), 1)
    with pytest.raises(DataError, match=r"no record of the whole corpus"):
        steps_of(feed_of(corpus(0)), 1)
