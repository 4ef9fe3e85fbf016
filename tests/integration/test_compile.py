"""compile=true trains the same, and compiles for no batch anew."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from sftx.run import run
from sftx.runs.metrics import read_metrics
from sftx.training import loop, tried

STEPS = 6


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="TorchInductor needs a C++ compiler")
@pytest.mark.parametrize("case", [["mode=lora", "lora_dropout=0.1", "gradient_checkpointing=true"], ["mode=full"]])
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
    # Left out when compiled; where it is not, the last block's dropout draws masks of another shape.
    monkeypatch.setattr(tried, "shorten", lambda block: None)
    found = {}
    for compiled in (False, True):
        config = make_config(*case, f"compile={compiled}", f"max_steps={STEPS}", "eval_ratio=0", output=str(compiled))
        run([config])
        records = read_metrics(Path(config.output_dir) / "metrics.jsonl")
        found[compiled] = [[r[k] for r in records if k in r] for k in ("train/loss", "train/grad_norm")]
    for plain, compiled in zip(found[False], found[True], strict=True):
        assert compiled == pytest.approx(plain, rel=1e-5)
    assert captured.trial.effective.facts()["settings"]["compile"] is True
    assert graphs == [0] * STEPS + [graphs[-1]] * STEPS
    assert graphs[-1] > 0


def test_without_a_compiler_it_is_said(make_config, captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sftx.model.compiled.shutil.which", lambda name: None)
    run([make_config("compile=true", "max_steps=1", "eval_ratio=0")])
    facts = captured.trial.effective.facts()
    assert [f["key"] for f in facts["fallbacks"] if f["key"] == "compile"] == ["compile"]
    assert facts["settings"]["compile"] is False
