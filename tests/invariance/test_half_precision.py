"""fp16, the default precision of a GPU, on a CPU: training makes the steps that fp32 makes, but for rounding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import SMALL, TWO_RANKS, over

from sftx.run import run
from sftx.training.saving.metrics import read_metrics

LARGE = [
    "max_seq_length=384", "per_device_train_batch_size=8", "gradient_accumulation_steps=1", "max_steps=2", "eval_steps=2",
]  # fmt: skip


def recorded(folder: Path, key: str) -> list[float]:
    return [r[key] for r in read_metrics(folder / "metrics.jsonl") if key in r]


@pytest.mark.slow
def test_full_training_makes_steps(make_config, request: pytest.FixtureRequest) -> None:
    """The head's weight gradient, a sum over all tokens of eight rows, is beyond what fp16 can hold."""
    found: dict[str, dict[str, Any]] = {}
    for precision in ("fp32", "fp16"):
        if precision == "fp16":
            request.getfixturevalue("fp16_on_cpu")
        config = make_config(*LARGE, "mode=full", output=precision)
        run([config])
        folder = Path(config.output_dir)
        assert json.loads((folder / "manifest.json").read_text())["result"]["skipped_steps"] == 0
        found[precision] = {key: recorded(folder, key) for key in ("train/grad_norm", "train/loss", "eval/loss")}
    before, after = found["fp32"]["eval/loss"]
    assert after < 0.99 * before, "two steps are seen in the evaluation"
    assert found["fp16"]["train/grad_norm"] == pytest.approx(found["fp32"]["train/grad_norm"], rel=0.02)
    for key in ("train/loss", "eval/loss"):
        assert found["fp16"][key] == pytest.approx(found["fp32"][key], rel=1e-3)


@pytest.mark.slow
def test_a_rank_without_rows_in_its_first_step(cli, tmp_path: Path) -> None:
    """Two ranks of gloo and one row: the second rank has scaled no loss when it steps, also after a resume."""
    words = over(
        SMALL, "max_train_rows=1", "eval_ratio=0", "num_train_epochs=9", "parallel=ddp", "save_strategy=steps",
        "save_steps=1", "precision._target_=tests.faults.half.Half", "allow_targets=[tests.faults.half.Half]",
        f"output_dir={tmp_path / 'run'}",
    )  # fmt: skip
    for steps in (1, 3):
        done = cli(*over(words, f"max_steps={steps}"), launcher=TWO_RANKS)
        assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["ranks"] == 2
    losses = recorded(tmp_path / "run", "train/loss")
    assert len(losses) == 3
    assert losses[2] < losses[0]
    assert len(recorded(tmp_path / "run", "train/loss_scale")) == 3
