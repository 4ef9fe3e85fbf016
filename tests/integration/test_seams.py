"""Extension points for what is built on a run: opening a model, sharding, regularizers, trials that end on their own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import over

import sftx.run
from sftx.errors import TrainingError
from sftx.parallel.engine import Engine
from sftx.run import run
from sftx.runs.result import Failure, Result
from sftx.training import loop
from sftx.training.callbacks import Callback
from sftx.training.loss import TokenLosses, token_losses
from sftx.training.measure.evaluate import evaluate
from sftx.training.opening import open_model

SHORT = ["mode=lora", "optimizer=sgd", "max_steps=3", "logging_steps=1"]


def test_a_model_is_opened_without_training(make_config, captured, one_thread) -> None:
    """It has the weights that a run leaves: the same loss, to the last bit."""
    config = make_config(*SHORT, "lora_dropout=0")
    result = run([config])[0]
    opened = open_model(make_config(*SHORT, f"adapter={result.output_dir / 'final'}", output="other"))
    session = captured.session
    found = evaluate(
        opened.engine, opened.model, opened.numerics, session.eval_rows, token_budget=256, padding_free=False,
        pad_id=session.pad_id,
    )  # fmt: skip
    trained = evaluate(
        session.engine, session.model, session.numerics, session.eval_rows, token_budget=256, padding_free=False,
        pad_id=session.pad_id,
    )  # fmt: skip
    assert found is not None
    assert trained is not None
    assert found.loss == pytest.approx(trained.loss, abs=1e-6)
    assert found.loss == pytest.approx(result.eval_loss, abs=1e-4)
    assert opened.template.tokenizer is not None


def test_an_engine_shards_the_model_before_any_optimizer_is_built(make_config, monkeypatch) -> None:
    """Every adapter is there by then, and an optimizer holds the parameters that sharding has left."""
    replaced: list[torch.nn.Parameter] = []

    def shard(self: Engine, model: Any) -> None:
        for adapter in model.adapters.values():
            assert all(p.grad is None for p in adapter.parameters.values())
            replaced.extend(adapter.parameters.values())

    held: list[torch.Tensor] = []
    build_stepper = Engine.stepper

    def stepper(self: Engine, model: Any, adapter: Any, optimizer: Any, *rest: Any) -> Any:
        assert replaced, "the model is sharded before"
        held.extend(p for group in optimizer.param_groups for p in group["params"])
        return build_stepper(self, model, adapter, optimizer, *rest)

    monkeypatch.setattr(Engine, "shard", shard)
    monkeypatch.setattr(Engine, "stepper", stepper)
    run([make_config(*SHORT, output="a"), make_config(*SHORT, "seed=7", output="b")])
    assert {id(p) for p in held} == {id(p) for p in replaced}


def test_a_regularizer_changes_the_gradient_before_clipping(make_config, captured, monkeypatch, one_thread) -> None:
    """A pull to zero, as a regularizer, is AdamW's weight decay under SGD: p - lr (g + c p)."""

    class Pull(Callback):
        def on_start(self, session: Any, trial: Any) -> None:
            trial.stepper.regularizers.append(pull)

    norms: list[float] = []

    def pull(parameters: Mapping[str, torch.nn.Parameter]) -> None:
        norms.append(float(torch.stack([p.grad.norm() for p in parameters.values() if p.grad is not None]).norm()))
        for parameter in parameters.values():
            assert parameter.grad is not None
            parameter.grad += 3 * parameter.detach()

    plain = make_config(*SHORT, "max_grad_norm=0", output="plain")
    decayed = make_config(*over(SHORT, "max_grad_norm=0"), output="decayed")
    run([plain])
    start = loop._start

    def with_pull(session: Any, trial: Any) -> None:
        trial.callbacks["pull"] = Pull()
        start(session, trial)

    monkeypatch.setattr(loop, "_start", with_pull)
    run([decayed])
    assert len(norms) == 3
    one, other = (load_file(Path(c.output_dir) / "final" / "adapter_model.safetensors") for c in (plain, decayed))
    assert any(not torch.equal(one[k], other[k]) for k in one)
    logged = [json.loads(line) for line in (Path(decayed.output_dir) / "metrics.jsonl").read_text().splitlines()]
    first = next(record["train/grad_norm"] for record in logged if "train/grad_norm" in record)
    assert first > norms[0], "the norm that is logged and clipped includes the regularizer"


def test_trials_of_one_call_end_each_on_its_own(make_config, captured, monkeypatch, capsys) -> None:
    """One fails, one is short, one goes on: each has its result, and the survivors the weights of a run of their own."""

    def spoiled(*arguments: Any) -> TokenLosses:
        found = token_losses(*arguments)
        active = next(t for t in captured.trials if t.adapter.clock is current["clock"])
        if active.name == "trial_0" and active.step == 1:
            return found._replace(weighted_sum=found.weighted_sum * torch.nan)
        return found

    current: dict[str, Any] = {}
    set_state = loop._set_random_state

    def noted(trial: Any, micro_batch: int) -> None:
        current["clock"] = trial.adapter.clock
        set_state(trial, micro_batch)

    monkeypatch.setattr(loop, "token_losses", spoiled)
    monkeypatch.setattr(loop, "_set_random_state", noted)
    ended: list[tuple[str, int]] = []

    class Last(Callback):
        def on_end(self, session: Any, trial: Any) -> None:
            ended.append((trial.name, max(t.step for t in captured.trials)))

    start = loop._start

    def watched(session: Any, trial: Any) -> None:
        trial.callbacks["last"] = Last()
        start(session, trial)

    monkeypatch.setattr(loop, "_start", watched)
    configs = [
        make_config(*SHORT, output="fails"),
        make_config(*over(SHORT, "max_steps=2"), "seed=7", output="short"),
        make_config(*over(SHORT, "max_steps=5"), "seed=8", output="long"),
    ]
    fails, short, long = run(configs)
    assert isinstance(fails, Failure)
    assert isinstance(fails.error, TrainingError)
    assert fails.steps == 1
    assert isinstance(short, Result)
    assert isinstance(long, Result)
    assert (short.steps, long.steps) == (2, 5)
    assert ended == [("trial_1", 2), ("trial_2", 5)], "the short one ended while the long one was at its second step"
    status = [json.loads((Path(c.output_dir) / "manifest.json").read_text())["status"] for c in configs]
    assert status == ["failed", "completed", "completed"]
    assert "the other trials go on" in capsys.readouterr().out
    assert not any((Path(c.output_dir) / ".lock").exists() for c in configs)
    assert "failed" in (Path(fails.output_dir) / "train.log").read_text()
    for config, name in zip(configs[1:], ("short alone", "long alone"), strict=True):
        alone = make_config(*over(SHORT, f"max_steps={config.max_steps}"), f"seed={config.seed}", output=name)
        run([alone])
        one, other = (load_file(Path(c.output_dir) / "final" / "adapter_model.safetensors") for c in (config, alone))
        assert all(torch.equal(one[k], other[k]) for k in one)


def test_where_every_trial_fails_the_first_ones_error_is_raised(make_config, monkeypatch) -> None:
    def spoiled(*arguments: Any) -> TokenLosses:
        found = token_losses(*arguments)
        return found._replace(weighted_sum=found.weighted_sum * torch.nan)

    monkeypatch.setattr(loop, "token_losses", spoiled)
    with pytest.raises(TrainingError, match=r"^step 1: the loss is nan"):
        run([make_config(*SHORT, output="a"), make_config(*SHORT, output="b")])


def test_a_session_trains_on_its_own_loss_and_evaluates_the_cross_entropy(make_config, monkeypatch) -> None:
    """Label smoothing and a KL term to the base are such losses; the base alone is asked `without_adapters`."""
    asked: list[float] = []

    def penalised(model: Any, batch: Any, device: torch.device) -> TokenLosses:
        with torch.no_grad(), model.without_adapters():
            base = token_losses(model, batch, device)
        own = token_losses(model, batch, device)
        asked.append(float((own.weighted_sum - base.weighted_sum).abs()))
        return own._replace(weighted_sum=own.weighted_sum * 2.0)

    open_session = sftx.run.open_session

    def with_loss(*arguments: Any) -> Any:
        session, *rest = open_session(*arguments)
        session.loss = penalised
        return session, *rest

    plain = run([make_config(*SHORT, "learning_rate=1", "max_grad_norm=0", "lora_dropout=0", output="plain")])[0]
    monkeypatch.setattr(sftx.run, "open_session", with_loss)
    doubled = run([make_config(*SHORT, "learning_rate=0.5", "max_grad_norm=0", "lora_dropout=0", output="doubled")])[0]
    assert len(asked) >= 3
    assert asked[0] == 0.0, "a new adapter changes nothing"
    assert asked[-1] > 0.0
    assert isinstance(plain, Result)
    assert isinstance(doubled, Result)
    assert doubled.eval_loss == pytest.approx(plain.eval_loss, rel=1e-6)
