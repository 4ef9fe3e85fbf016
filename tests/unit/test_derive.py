"""How long a run is: epochs, whole or not, in steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sftx.config.checks.check import freeze
from sftx.config.composition.prepare import compose_checked
from sftx.config.derive import SEQUENCES, config_hash, derive_steps, differences
from sftx.config.schema import TrainConfig


def composed(*typed: str) -> TrainConfig:
    return freeze(compose_checked(["gradient_accumulation_steps=1", *typed]))


@pytest.mark.parametrize(
    ("epochs", "units", "steps"),
    [("1", 10, 10), ("3.0", 10, 30), ("0.5", 10, 5), ("0.5", 11, 6), ("0.001", 10, 1), ("1.5", 7, 11), ("0.07", 100, 7),
     ("1.1", 10, 11)],
)  # fmt: skip
def test_a_part_of_an_epoch_is_rounded_up_to_whole_steps(epochs: str, units: int, steps: int) -> None:
    """As it is written: 0.07 of 100 steps are 7, though 0.07 * 100 is 7.000000000000001."""
    found = derive_steps(composed(f"num_train_epochs={epochs}"), units, 1)
    assert (found.per_epoch, found.total) == (units, steps)


def test_the_formula_states_the_epochs_as_they_were_written() -> None:
    half = derive_steps(composed("num_train_epochs=0.5"), 11, 1)
    assert half.formula.endswith("= 11 steps x 0.5 epochs = 6 steps")
    assert "epochs" not in derive_steps(composed("num_train_epochs=1.0"), 11, 1).formula
    assert derive_steps(composed("num_train_epochs=3"), 11, 1).formula.endswith("11 steps x 3 epochs = 33 steps")


def test_a_whole_number_with_a_point_is_the_same_run(tmp_path: Path) -> None:
    (tmp_path / "args.json").write_text(json.dumps({"num_train_epochs": 3.0}))
    assert "3.0" in (tmp_path / "args.json").read_text()
    from_json = composed(f"args_file={tmp_path}/args.json")
    assert config_hash(from_json) == config_hash(composed("num_train_epochs=3"))


def test_differences_of_a_refused_resume_are_named_to_the_key() -> None:
    long = "x" * 90
    before = {"config": {"mode": {"rank": 8, "alpha": 16}, "text": f"{long}left", SEQUENCES: 2}}
    after = {"config": {"mode": {"rank": 16, "alpha": 16}, "text": f"{long}right", SEQUENCES: 4}}
    rank, sequences, text = sorted(differences(before, after))
    assert rank == "mode.rank: 8 -> 16"
    assert sequences == "per_device_train_batch_size x gradient_accumulation_steps x processes: 2 -> 4"
    was, now = text.split(" -> ")
    assert was.endswith('left"')
    assert now.endswith('right"')
