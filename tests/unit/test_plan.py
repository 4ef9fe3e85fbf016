"""Which rows make which step."""

from __future__ import annotations

import random

import pytest

from sftx.data.batches.plan import Plan, pack

_random = random.Random(1)
LENGTHS = [_random.randint(5, 400) for _ in range(500)]
KINDS = ["padding_free", "padded", "length_bucketed", "packed"]


def plan(batching: str, *, batch_size: int = 2, accumulation: int = 4, world_size: int = 1, seed: int = 3) -> Plan:
    return Plan(LENGTHS, batching, 512, batch_size * accumulation * world_size, seed)  # type: ignore[arg-type]


@pytest.mark.parametrize("batching", KINDS)
def test_an_epoch_holds_every_row_once_and_the_next_another_order(batching: str) -> None:
    p = plan(batching)
    epochs = [[i for step in range(p.steps_per_epoch) for i in p.rows(e * p.steps_per_epoch + step)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(len(LENGTHS)))
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("batching", KINDS)
def test_ranks_share_a_step_without_loss_or_repetition(batching: str) -> None:
    alone, two = plan(batching, accumulation=6), plan(batching, accumulation=3, world_size=2)
    assert alone.steps_per_epoch == two.steps_per_epoch
    for step in (0, 5, alone.steps_per_epoch - 1, alone.steps_per_epoch + 1):
        assert alone.rows(step) == two.rows(step)
        shares = [two.share(step, 2, 2, rank) for rank in range(2)]
        assert len(shares[0]) == len(shares[1])
        assert sorted(i for share in shares for _, rows in share for i in rows) == sorted(alone.rows(step))


@pytest.mark.parametrize("batching", KINDS)
def test_the_order_is_a_function_of_the_seed_and_the_step_alone(batching: str) -> None:
    one, other = plan(batching), plan(batching)
    steps = list(range(2 * one.steps_per_epoch))
    backwards = {s: other.rows(s) for s in reversed(steps)}  # as a resumed run asks, in any order
    assert all(one.rows(s) == backwards[s] for s in steps)
    assert one.rows(0) != plan(batching, seed=4).rows(0)


def test_padding_free_holds_the_very_rows_of_padded() -> None:
    free, padded = plan("padding_free"), plan("padded")
    assert [free.micro_batches(s, 2) for s in range(100)] == [padded.micro_batches(s, 2) for s in range(100)]


def test_buckets_hold_rows_of_like_length() -> None:
    def padding(p: Plan) -> int:
        micro = [m for s in range(p.steps_per_epoch) for m in p.micro_batches(s, 2)]
        return sum(len(m) * max(LENGTHS[i] for i in m) for m in micro) - sum(LENGTHS)

    assert padding(plan("length_bucketed")) < 0.1 * padding(plan("padded"))
    sizes = [len(plan("length_bucketed").rows(s)) for s in range(plan("padded").steps_per_epoch)]
    assert sizes == [len(plan("padded").rows(s)) for s in range(len(sizes))], "the smaller step stays the last one"


def test_packs_are_full_and_never_too_full() -> None:
    p = plan("packed")
    packs = [m for s in range(p.steps_per_epoch) for m in p.micro_batches(s, 2)]
    assert all(sum(LENGTHS[i] for i in m) <= 2 * 512 for m in packs)
    assert p.packing_waste() < 0.02
    assert p.sequence_count == len(pack(range(len(LENGTHS)), LENGTHS, 512))


def test_a_pack_is_the_fullest_that_has_room() -> None:
    assert pack([0, 1, 2, 3, 4], [6, 5, 3, 2, 4], 10) == [(0, 4), (1, 2, 3)]
    assert pack([1, 0], [7, 7], 10) == [(1,), (0,)], "the order decides among rows of equal length"
    assert pack([0, 1], [12, 3], 10) == [(0,), (1,)], "a row longer than a pack is alone"


def test_packing_a_hundred_thousand_rows_is_quick_and_tight() -> None:
    lengths = [min(1024, int(_random.lognormvariate(4.6, 0.8)) + 5) for _ in range(100_000)]
    packs = pack(range(len(lengths)), lengths, 1024)
    assert sum(lengths) / (1024 * len(packs)) > 0.98
