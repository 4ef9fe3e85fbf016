"""A loss or gradient that is not finite never reaches the weights, and is dealt with as was asked."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import over

from sftx.errors import TrainingError
from sftx.run import run
from sftx.training import loop, recovery
from sftx.training.loss import TokenLosses, token_losses
from sftx.training.measure.evaluate import Evaluation
from sftx.training.saving.metrics import read_metrics
from sftx.training.schedulers import ReduceOnPlateau

SHARED = ["mode=lora", "lora_dropout=0", "eval_ratio=0", "max_steps=6", "save_strategy=steps", "save_steps=2"]


def break_step(
    monkeypatch: pytest.MonkeyPatch, captured, how: Callable[[TokenLosses], TokenLosses], *steps: int
) -> None:
    """Spoil the losses of some steps (from 1), each time they are made."""

    def spoiled(*arguments: object) -> TokenLosses:
        found = token_losses(*arguments)  # type: ignore[arg-type]
        return how(found) if captured.trial.step + 1 in steps else found

    monkeypatch.setattr(loop, "token_losses", spoiled)


def nan_loss(found: TokenLosses) -> TokenLosses:
    return found._replace(weighted_sum=found.weighted_sum * torch.nan)


def infinite_gradient(found: TokenLosses) -> TokenLosses:
    """The loss is as it was."""
    found.weighted_sum.register_hook(lambda g: g * torch.inf)
    return found


def infinite_loss_alone(found: TokenLosses) -> TokenLosses:
    """The gradient is as it was."""
    return found._replace(weighted_sum=found.weighted_sum + torch.inf)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def lines(folder: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["train/loss"]) for r in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.parametrize("how", [nan_loss, infinite_gradient, infinite_loss_alone], ids=lambda f: f.__name__)
def test_a_run_stops_and_names_step_and_rows(make_config, monkeypatch, captured, how) -> None:
    break_step(monkeypatch, captured, how, 4)
    config = make_config(*SHARED)
    with pytest.raises(TrainingError, match=r"step 4: the loss is .* Rows of the step: .*aspcoder_train\.csv:\d+"):
        run([config])
    folder = Path(config.output_dir)
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"step-000002"}
    assert not (folder / "final").exists()
    trained = captured.trial.stepper.weights()
    assert all(torch.isfinite(t).all() for t in trained.values())
    assert json.loads((folder / "manifest.json").read_text())["status"] == "failed"
    monkeypatch.undo()
    run([config])  # goes on at step 2 as if nothing had been
    other = make_config(*SHARED, output="straight")
    run([other])
    assert lines(folder) == lines(Path(other.output_dir))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("how", [nan_loss, infinite_loss_alone], ids=lambda f: f.__name__)
def test_a_step_is_skipped(make_config, monkeypatch, captured, how, precision: str, request) -> None:
    if precision == "fp16":
        request.getfixturevalue("fp16_on_cpu")
    break_step(monkeypatch, captured, how, 3, 4)
    config = make_config(*over(SHARED, "on_nonfinite=skip", "save_steps=1", "save_total_limit=null", "optimizer=sgd"))
    run([config])
    folder = Path(config.output_dir)
    saved = {n: weights(folder / "checkpoints" / f"step-00000{n}") for n in range(1, 7)}
    same = {n: all(torch.equal(saved[n][k], saved[n + 1][k]) for k in saved[n]) for n in range(1, 6)}
    assert same == {1: False, 2: True, 3: True, 4: False, 5: False}
    result = json.loads((folder / "manifest.json").read_text())["result"]
    assert (result["skipped_steps"], result["rollbacks"]) == (2, 0)
    assert "It is skipped" in (folder / "train.log").read_text()
    assert read_metrics(folder / "metrics.jsonl")[-1]["train/skipped_steps"] == 2


def test_many_steps_in_a_row_are_no_accident(make_config, monkeypatch, captured) -> None:
    break_step(monkeypatch, captured, nan_loss, *range(2, 50))
    with pytest.raises(TrainingError, match="10 steps before it were skipped already"):
        run([make_config(*over(SHARED[:3], "on_nonfinite=skip", "max_steps=40", "gradient_accumulation_steps=1"))])
    assert captured.trial.step == 11


def test_a_run_goes_back_with_a_smaller_rate(make_config, monkeypatch, captured) -> None:
    """Step 4 breaks until the rate is a quarter; what was made twice is recorded once."""
    break_step(monkeypatch, captured, nan_loss, 4)
    spoiled = loop.token_losses
    monkeypatch.setattr(
        loop, "token_losses", lambda *a: spoiled(*a) if captured.trial.faults.rollbacks < 2 else token_losses(*a)
    )
    config = make_config(*over(SHARED, "on_nonfinite=rollback", "scheduler=constant"))
    run([config])
    folder = Path(config.output_dir)
    records = read_metrics(folder / "metrics.jsonl")
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert [r["train/learning_rate"] for r in records] == pytest.approx([1e-3] * 2 + [2.5e-4] * 4)
    assert json.loads((folder / "manifest.json").read_text())["result"]["rollbacks"] == 2
    assert (folder / "train.log").read_text().count("Back to step 2") == 2


def test_going_back_ends_too(make_config, monkeypatch, captured) -> None:
    break_step(monkeypatch, captured, nan_loss, 4)
    with pytest.raises(TrainingError, match="3 rollbacks have not helped"):
        run([make_config(*over(SHARED, "on_nonfinite=rollback"))])
    break_step(monkeypatch, captured, nan_loss, 2)
    with pytest.raises(TrainingError, match="no checkpoint to go back to: set a smaller save_steps"):
        run([make_config(*over(SHARED, "on_nonfinite=rollback"), output="none")])


@pytest.mark.parametrize("rate", ["1e-30", "1e30"])
def test_any_rate_reaches_the_loop_and_nothing_broken_is_published(make_config, rate: str) -> None:
    config = make_config(*over(SHARED, f"learning_rate={rate}", "optimizer=sgd", "max_grad_norm=0", "save_steps=1"))
    folder = Path(config.output_dir)
    if rate == "1e-30":
        run([config])
    else:
        with pytest.raises(TrainingError, match=r"step \d: (the loss is|`.*` holds numbers that are not finite)"):
            run([config])
        assert not (folder / "final").exists()
    for path in folder.rglob("*.safetensors"):
        assert all(torch.isfinite(t).all() for t in load_file(path).values()), path


def spiked(found: TokenLosses) -> TokenLosses:
    return found._replace(weighted_sum=found.weighted_sum * 5)


SPIKED = over(SHARED, "max_steps=30", "gradient_accumulation_steps=1", "save_steps=10", "logging_steps=1")


def test_a_spike_is_not_learned_from_in_fp16(make_config, monkeypatch, captured, fp16_on_cpu) -> None:
    """The loss scaler finds nothing wrong with its gradient."""
    monkeypatch.setattr(recovery, "EMA_WARMUP_STEPS", 2)
    monkeypatch.setattr(recovery, "LEAST_RISE", 1.0)
    break_step(monkeypatch, captured, lambda f: f._replace(weighted_sum=f.weighted_sum * 50), 4)
    config = make_config(*over(SHARED, "on_loss_spike=skip", "save_steps=1", "save_total_limit=null", "optimizer=sgd"))
    run([config])
    saved = [weights(Path(config.output_dir) / "checkpoints" / f"step-00000{n}") for n in (3, 4, 5)]
    same = [all(torch.equal(a[k], b[k]) for k in a) for a, b in pairwise(saved)]
    assert same == [True, False]
    assert captured.trial.faults.skipped == 1


def test_steps_that_the_loss_scaler_skips_are_counted(make_config, monkeypatch, captured, fp16_on_cpu) -> None:
    """A few are usual: said once a stretch, and the run goes on."""
    break_step(monkeypatch, captured, infinite_gradient, 1, 2, 3, 5)
    config = make_config(*SHARED)
    run([config])
    folder = Path(config.output_dir)
    assert json.loads((folder / "manifest.json").read_text())["result"]["skipped_steps"] == 4
    assert (folder / "train.log").read_text().count("the gradient overflowed fp16") == 2
    assert captured.trial.stepper.loss_scale == 2.0**16 / 2**4
    assert captured.trial.faults.overflows_in_a_row == 0


def test_overflows_have_an_end(make_config, monkeypatch, captured, fp16_on_cpu) -> None:
    break_step(monkeypatch, captured, infinite_gradient, *range(2, 50))
    with pytest.raises(TrainingError, match=r"step 21: the gradient overflowed fp16 in 20 steps in a row.*bf16=true"):
        run([make_config(*over(SHARED, "max_steps=40", "gradient_accumulation_steps=1", "save_strategy=no"))])
    assert all(torch.isfinite(t).all() for t in captured.trial.stepper.weights().values())


@pytest.mark.parametrize("policy", ["warn", "skip", "rollback", "stop"])
def test_a_loss_that_stands_far_out(make_config, monkeypatch, captured, policy: str) -> None:
    def spike_once(*a: object) -> TokenLosses:
        return (
            spiked(token_losses(*a))
            if captured.trial.step == 24 and not captured.trial.faults.rollbacks
            else token_losses(*a)
        )

    monkeypatch.setattr(loop, "token_losses", spike_once)
    config = make_config(*SPIKED, f"on_loss_spike={policy}")
    if policy == "stop":
        with pytest.raises(
            TrainingError, match=r"step 25: the loss is .*, after .* on average.*csv:\d+.*Or on_loss_spike="
        ):
            run([config])
        return
    run([config])
    log = (Path(config.output_dir) / "train.log").read_text()
    assert "step 25: the loss is" in log
    assert f"on_loss_spike={policy}" in log
    result = json.loads((Path(config.output_dir) / "manifest.json").read_text())["result"]
    found = (result["loss_spikes"], result["skipped_steps"], result["rollbacks"])
    assert found == {"warn": (1, 0, 0), "skip": (0, 1, 0), "rollback": (0, 0, 1)}[policy]


def test_an_ordinary_run_has_no_spikes(make_config, captured) -> None:
    run([make_config(*over(SPIKED, "max_steps=60"))])
    assert captured.trial.faults.spikes == 0
    assert captured.trial.loss_ema.steps == 60


@pytest.mark.parametrize("spoiled", [math.nan, math.inf, -math.inf])
def test_an_evaluation_that_is_not_finite_is_never_the_best(make_config, monkeypatch, captured, spoiled) -> None:
    """The first of five is: the fifth, the lowest, becomes final/; schedule and early stopping do not hear of it."""
    losses, observed = iter([9.0, spoiled, 5.0, 6.0, 7.0, 4.0]), []

    def evaluate(*arguments: object, **named: object) -> Evaluation:
        return Evaluation(next(losses), {}, 1, 0.0)

    monkeypatch.setattr(loop, "evaluate", evaluate)
    monkeypatch.setattr(ReduceOnPlateau, "observe", lambda self, loss: observed.append(loss))
    words = over(SHARED, "eval_ratio=0.15", "eval_steps=1", "save_steps=1", "max_steps=5", "keep_best=true")
    config = make_config(
        *words, "scheduler=reduce_lr_on_plateau", "callback=early_stopping", "callback.early_stopping.patience=3"
    )
    (result,) = run([config])
    assert (result.steps, result.eval_loss) == (5, 4.0)
    assert observed == [5.0, 6.0, 7.0, 4.0]
    assert captured.trial.callbacks["early_stopping"].state() == {"best": 4.0, "waited": 0}
    assert json.loads((Path(config.output_dir) / "manifest.json").read_text())["result"]["final_step"] == 5
    said = (Path(config.output_dir) / "train.log").read_text()
    assert said.count("WARNING step 1: the eval loss is not finite") == 1
    assert "nan%" not in said
