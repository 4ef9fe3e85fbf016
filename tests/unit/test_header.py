"""What the header and the last lines of a run state, in words."""

from __future__ import annotations

from typing import Any

import pytest

from sftx.config.derive import derive_steps
from sftx.runs.header import length_line
from sftx.terminal import counted


@pytest.mark.parametrize(
    ("number", "said"), [(0, "0 steps"), (1, "1 step"), (1.0, "1 step"), (2, "2 steps"), (0.5, "0.5 steps")]
)
def test_a_noun_is_plural_unless_there_is_one(number: float, said: str) -> None:
    assert counted(number, "step") == said


def test_the_lengths_of_rows() -> None:
    assert length_line([*range(1, 101)], 64).startswith("tokens per row: median 51, p90 91, p99 100, max 100; ")


@pytest.mark.parametrize(
    ("words", "units", "world", "said"),
    [
        (["per_device_train_batch_size=8", "gradient_accumulation_steps=1"], 380, 1, "380 rows / (batch size 8 x 1 accumulation step) = 48 steps"),
        (["per_device_train_batch_size=2", "gradient_accumulation_steps=4", "num_train_epochs=3"], 16, 2, "16 rows / (batch size 2 x 4 accumulation steps x 2 ranks) = 1 step x 3 epochs = 3 steps"),
        (["per_device_train_batch_size=auto", "gradient_accumulation_steps=16"], 16, 1, "16 rows / (16 sequences per step) = 1 step"),
        (["gradient_accumulation_steps=16", "max_steps=7"], 16, 1, "max_steps=7 (1 step per epoch)"),
    ],
)  # fmt: skip
def test_the_steps_of_a_run(make_config: Any, words: list[str], units: int, world: int, said: str) -> None:
    assert derive_steps(make_config(*words, small=False), units, world).formula == said
