"""compile=true trains the same, compiles every layer, and compiles for no batch anew."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from sftx.model.kernels import compiled
from sftx.run import run
from sftx.training import loop
from sftx.training.saving.metrics import read_metrics

STEPS = 6
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="TorchInductor needs a C++ compiler")
LORA = ["mode=lora", "lora_dropout=0.1", "gradient_checkpointing=true"]


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("case", [LORA, ["mode=full"], ["mode=qlora", "lora_dropout=0.1"]], ids=lambda c: c[0])
def test_compiled_training_is_the_same(make_config, captured, monkeypatch, case: list[str]) -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    graphs: list[int] = []
    launch = loop._launch

    def count(session, trial, step):  # type: ignore[no-untyped-def]
        launched = launch(session, trial, step)
        graphs.append(counters["stats"]["unique_graphs"])
        return launched

    monkeypatch.setattr(loop, "_launch", count)
    found = {}
    for asked in (False, True):
        config = make_config(*case, f"compile={asked}", f"max_steps={STEPS}", "eval_steps=3", output=str(asked))
        run([config])
        records = read_metrics(Path(config.output_dir) / "metrics.jsonl")
        found[asked] = [[r[k] for r in records if k in r] for k in ("train/loss", "train/grad_norm", "eval/loss")]
    for plain, fast in zip(found[False], found[True], strict=True):
        assert fast == pytest.approx(plain, rel=1e-5)
    effective = captured.trial.effective.facts()
    assert effective["settings"]["compile"] is True
    assert not [f for f in effective["fallbacks"] if f["key"] == "compile"]
    assert graphs == [0] * STEPS + [graphs[-1]] * STEPS
    assert graphs[-1] > 0
    if case is LORA:  # only attention itself is left out of what is compiled
        assert counters["graph_break"].total() == 2, counters["graph_break"]  # in training and in evaluation


@pytest.mark.slow
@needs_compiler
def test_a_function_that_torch_compiles_no_more_is_named(make_config, captured, monkeypatch) -> None:
    monkeypatch.setattr(compiled, "VARIANTS", 1)
    config = make_config(*LORA, "compile=true", "max_steps=1")
    run([config])
    effective = json.loads((Path(config.output_dir) / "manifest.json").read_text())["effective"]
    assert effective["settings"]["compile"] == "in part"
    (fallback, *_) = [f for f in effective["fallbacks"] if f["key"] == "compile"]
    assert "forward" in fallback["reason"]


def test_without_a_compiler_it_is_said(make_config, captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sftx.model.kernels.compiled.shutil.which", lambda name: None)
    run([make_config("compile=true", "max_steps=1", "eval_ratio=0")])
    facts = captured.trial.effective.facts()
    assert [f["key"] for f in facts["fallbacks"] if f["key"] == "compile"] == ["compile"]
    assert facts["settings"]["compile"] is False
