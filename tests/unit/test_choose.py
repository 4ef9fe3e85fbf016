"""Duplicates, conflicts, caps and mixing."""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from sftx.data.records.choose import ChoosePolicy, choose, exact_duplicates, facts_of, mixed
from sftx.data.records.record import Record, pair
from sftx.errors import ConfigError, DataError


def corpus(*rows: tuple[str, str, str], sources: Sequence[str] = ("s",)) -> list[Record]:
    made = [pair(c, h, a, "f.csv", i + 2, {}) for i, (c, h, a) in enumerate(rows)]
    return [replace(r, source=sources[i % len(sources)]) for i, r in enumerate(made)]


LONG = "The quick brown fox jumps over the lazy dog while five boxing wizards watch them from the hill."
RECORDS = corpus(
    ("a", "What is 1+1?", "2"),
    ("a", "What is 1+1?", "2"),
    ("b", "What is 1+1?", "two"),
    ("b", f"{LONG} Name a colour, please, that is often seen in the sky at noon.", "Blue"),
    ("b", f"{LONG} Name a colour,  please, that is often seen in the sky at Noon!", "Blue"),
    ("c", "Other", "x"),
)
FACTS = facts_of(RECORDS)


def kept(**policy) -> list[int]:
    return choose(FACTS, RECORDS, ChoosePolicy(**policy), seed=0).kept.tolist()


def test_nothing_is_left_out_unless_asked() -> None:
    assert kept() == list(range(6))


def test_exact_duplicates_go_and_are_named() -> None:
    choice = choose(FACTS, RECORDS, ChoosePolicy(duplicates="drop_exact"), seed=0)
    assert choice.left_out == [(1, "is f.csv:2 again")]


def test_each_duplicate_is_named_with_the_first() -> None:
    draw = random.Random(0)
    many = corpus(*(("c", f"q{draw.randrange(30)}", f"a{draw.randrange(4)}") for _ in range(500)))
    first: dict[tuple[str, str], str] = {}
    wanted = []
    for i, record in enumerate(many):
        origin = first.setdefault((record.human, record.assistant), record.origin)
        if origin != record.origin:
            wanted.append((i, f"is {origin} again"))
    assert list(exact_duplicates(facts_of(many), many)) == wanted


def test_near_duplicates_go() -> None:
    choice = choose(FACTS, RECORDS, ChoosePolicy(duplicates="drop_near"), seed=0)
    assert choice.kept.tolist() == [0, 2, 3, 5]
    assert choice.left_out[1] == (4, "is nearly f.csv:5 (MinHash, near_threshold=0.8)")
    assert kept(duplicates="drop_near", near_threshold=0.99) == [0, 2, 3, 4, 5]


@pytest.mark.parametrize(("policy", "left"), [("drop", [3, 4, 5]), ("keep_first", [0, 1, 3, 4, 5])])
def test_conflicting_answers(policy: str, left: list[int]) -> None:
    assert kept(conflicts=policy) == left


def test_a_conflict_can_be_an_error() -> None:
    with pytest.raises(DataError, match=r"1 prompts have several answers: f\.csv:2 and f\.csv:3"):
        kept(conflicts="error")
    assert choose(FACTS, RECORDS, ChoosePolicy(conflicts="keep_first"), 0).left_out == [
        (2, "answers otherwise than f.csv:2")
    ]


def test_caps_leave_so_many_of_each() -> None:
    many = corpus(*(("ab"[i % 2], f"q{i}", "x") for i in range(100)), sources=[f"s{i}" for i in range(5)])
    facts = facts_of(many)
    chosen = choose(facts, many, ChoosePolicy(cap_per_category=7), seed=1).kept
    assert Counter(many[i].category for i in chosen) == {"a": 7, "b": 7}
    again = choose(facts, many, ChoosePolicy(cap_per_category=7), seed=1).kept
    other = choose(facts, many, ChoosePolicy(cap_per_category=7), seed=2).kept
    assert chosen.tolist() == again.tolist() != other.tolist()
    both = choose(facts, many, ChoosePolicy(cap_per_category=30, cap_per_source=4), seed=1).kept
    assert max(Counter(facts.sources[i] for i in both).values()) == 4


def test_weights_repeat_and_thin_out() -> None:
    many = corpus(*(("ab"[i % 2], f"q{i}", "x") for i in range(2000)))
    facts = facts_of(many)
    seen = Counter(mixed(facts, np.arange(2000), ChoosePolicy(category_weights={"a": 2.5, "b": 0.2}), 0).tolist())
    a, b = [seen[i] for i in range(0, 2000, 2)], [seen[i] for i in range(1, 2000, 2)]
    assert set(a) == {2, 3}
    assert set(b) == {0, 1}
    assert np.mean(a) == pytest.approx(2.5, abs=0.06)
    assert np.mean(b) == pytest.approx(0.2, abs=0.05)


def test_temperature_lifts_small_sources_at_the_same_total() -> None:
    many = corpus(*(("a", f"q{i}", "x") for i in range(1000)), sources=["small", *["large"] * 9])
    facts = facts_of(many)
    seen = mixed(facts, np.arange(1000), ChoosePolicy(temperature=2.0), 0)
    share = np.mean([facts.sources[i] == "small" for i in seen])
    assert share == pytest.approx(0.25, abs=0.01), "sqrt(100) : sqrt(900) = 1 : 3"
    assert len(seen) == pytest.approx(1000, abs=40)


def test_a_weight_of_nothing_is_a_mistake() -> None:
    with pytest.raises(DataError, match=r"no record has the category `bb`.*Did you mean"):
        mixed(facts_of(corpus(("bbb", "q", "x"))), np.arange(1), ChoosePolicy(category_weights={"bb": 2}), 0)


def test_what_leaves_nothing_is_a_mistake() -> None:
    with pytest.raises(DataError, match="leave no record"):
        choose(facts_of(RECORDS[:3:2]), RECORDS[:3:2], ChoosePolicy(conflicts="drop"), 0)


def test_without_datasketch_it_is_said_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(ConfigError, match=r"pip install .*datasketch"):
        kept(duplicates="drop_near")
