"""Deferred read-back of the loss, as on a GPU, changes nothing but the time of reading."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import over

from sftx.errors import TrainingError
from sftx.parallel.engine import Engine
from sftx.run import run
from sftx.training import loop
from sftx.training.loss import TokenLosses, token_losses
from sftx.training.saving.metrics import read_metrics

SHARED = [
    "mode=lora", "optimizer=adamw", "max_steps=9", "logging_steps=4", "eval_steps=6", "save_strategy=steps",
    "save_steps=3", "save_total_limit=null", "lora_dropout=0.1",
]  # fmt: skip


FP16 = ("fp16=true",)
"""The default; a CPU computes in it in tests alone."""


@pytest.fixture
def deferred(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the steps that were not read before the next one was launched; none without `late`."""
    found: list[int] = []
    launch = loop._launch

    def noted(session: Any, trial: Any, step: Any) -> Any:
        launched = launch(session, trial, step)
        if trial.pending is not None:
            found.append(trial.pending.number)
        return launched

    monkeypatch.setattr(loop, "_launch", noted)
    return found


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch, deferred: list[int]) -> Callable[[bool], None]:
    """Return a function that defers the reading of losses, or not."""

    def switch(on: bool) -> None:
        monkeypatch.setattr(Engine, "defers_loss", on)
        deferred.clear()

    return switch


def spoil(monkeypatch: pytest.MonkeyPatch, captured: Any, *steps: int) -> None:
    """Let the losses of some steps (from 1) be no numbers, the first time that each is made."""
    left = set(steps)

    def spoiled(*arguments: Any) -> TokenLosses:
        found = token_losses(*arguments)
        if captured.trial.step + 1 not in left:
            return found
        left.discard(captured.trial.step + 1)
        return found._replace(weighted_sum=found.weighted_sum * torch.nan)

    monkeypatch.setattr(loop, "token_losses", spoiled)


def outcome(folder: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor], list[str]]:
    """Return a run's records without its times, its weights, and its checkpoints."""
    records = [
        {k: v for k, v in r.items() if not k.startswith("perf/") and k not in ("time", "eval/seconds")}
        for r in read_metrics(folder / "metrics.jsonl")
    ]
    return (
        records,
        load_file(folder / "final" / "adapter_model.safetensors"),
        sorted(p.name for p in (folder / "checkpoints").iterdir()),
    )


def assert_same(one: Any, other: Any) -> None:
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    assert all(torch.equal(one[1][k], other[1][k]) for k in one[1])
    assert one[2] == other[2]


@pytest.mark.parametrize(
    "typed",
    [
        (),
        ("max_grad_norm=0.05", "gradient_accumulation_steps=1"),
        ("mode=full",),
        pytest.param(FP16, marks=pytest.mark.slow),
    ],
)
def test_the_same_bits(make_config, one_thread, late, deferred, request, typed: tuple[str, ...]) -> None:
    if typed == FP16:
        request.getfixturevalue("fp16_on_cpu")
    results = []
    for on in (False, True):
        late(on)
        config = make_config(*over(SHARED, *typed), output=f"late {on}")
        run([config])
        results.append((deferred.copy(), outcome(Path(config.output_dir))) if "mode=full" not in typed else None)
        if results[-1] is None:
            folder = Path(config.output_dir)
            results[-1] = (deferred.copy(), ([], load_file(folder / "final" / "model.safetensors"), []))
    assert results[0][0] == []
    assert results[1][0] == [2, 5, 7]  # the others are recorded, evaluated or saved
    assert_same(results[0][1], results[1][1])


@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_step_that_is_not_finite(
    make_config, monkeypatch, captured, one_thread, late, deferred, policy, precision, request
) -> None:
    """The device leaves the weights alone; what is to become of it is decided one step later, to the same end."""
    if precision == "fp16":
        request.getfixturevalue("fp16_on_cpu")
    results = []
    for on in (False, True):
        late(on)
        spoil(monkeypatch, captured, 5)
        config = make_config(*over(SHARED, f"on_nonfinite={policy}"), output=f"late {on}")
        run([config])
        results.append(outcome(Path(config.output_dir)))
        faults = captured.trial.faults
        assert (faults.skipped, faults.rollbacks) == ((1, 0) if policy == "skip" else (0, 1))
        assert (5 in deferred) == on
    assert_same(*results)


def test_it_stops_and_names_the_step(make_config, monkeypatch, captured, late, deferred) -> None:
    late(True)
    spoil(monkeypatch, captured, 5)
    config = make_config(*SHARED)
    with pytest.raises(TrainingError, match=r"^step 5: the loss is nan, .* The weights are as before it"):
        run([config])
    assert 5 in deferred
    folder = Path(config.output_dir)
    assert all(torch.isfinite(t).all() for t in captured.trial.stepper.weights().values())
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-000003"]
    assert json.loads((folder / "manifest.json").read_text())["status"] == "failed"


@pytest.mark.parametrize("typed", ["on_loss_spike=skip", "optimizer=sgd"])
def test_what_must_know_the_loss_before_it_goes_on(make_config, late, deferred, typed: str) -> None:
    """A loss that decides, an optimizer without a flag on the device: it is asked for at once."""
    late(True)
    run([make_config(*over(SHARED, typed, "max_steps=4"))])
    assert deferred == []
