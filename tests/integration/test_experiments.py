"""Every experiment and debug option trains: big models with the embedded one in their place."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from sftx.config.checks.check import freeze
from sftx.config.composition.prepare import compose_checked
from sftx.config.derive import sequences_per_device
from sftx.config.options import options
from sftx.errors import ConfigError
from sftx.run import run

QUICK = (
    "max_steps=2",
    "max_train_rows=40",
    "eval_max_rows=4",
    "gradient_accumulation_steps=1",
    "report_to=none",
    "disable_tqdm=true",
)


def test_none_is_left_out() -> None:
    assert options("experiment") == ["quickstart", "qwen1_5_7b_lora", "qwen2_5_7b_full_zero3", "qwen2_5_7b_qlora"]
    assert options("debug") == ["fast_dev", "overfit", "profile"]


@pytest.mark.parametrize(
    ("experiment", "sequences"), [("qwen1_5_7b_lora", 16), ("qwen2_5_7b_qlora", 16), ("qwen2_5_7b_full_zero3", 4)]
)
def test_a_7b_step_takes_as_few_passes_as_memory_allows(experiment: str, sequences: int) -> None:
    """A pass of many rows launches as many kernels as one of a single row; the manual's default stays 1."""
    config = freeze(compose_checked([f"experiment={experiment}"]))
    assert config.per_device_train_batch_size == "auto"
    assert sequences_per_device(config) == sequences
    assert compose_checked([]).per_device_train_batch_size == 1


@pytest.mark.parametrize("experiment", [e for e in options("experiment") if "zero3" not in e])
def test_an_experiment_runs_two_steps(make_config, captured, experiment: str) -> None:
    run([make_config(f"experiment={experiment}", "model_name_or_path=qwen-tiny", *QUICK, small=False)])
    assert captured.trial.step == 2
    assert captured.trial.adapter.is_lora


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.timeout(600)
def test_the_zero3_experiment_runs_two_steps(cli, tmp_path: Path) -> None:
    """In a process of its own: DeepSpeed changes torch for good."""
    folder = tmp_path / "run"
    done = cli(
        "experiment=qwen2_5_7b_full_zero3", "model_name_or_path=qwen-tiny", *QUICK, f"output_dir={folder}", timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["result"]["steps"] == 2
    assert manifest["model"]["trained_parameters"] == manifest["model"]["parameters"] > 2_000_000


def test_overfit_learns_eight_rows_by_heart(make_config, captured) -> None:
    config = make_config(
        "debug=overfit", "mode=full", "learning_rate=3e-3", "report_to=none", "disable_tqdm=true", small=False
    )
    run([config])
    from sftx.training.saving.metrics import read_metrics

    losses = [r["train/loss"] for r in read_metrics(Path(config.output_dir) / "metrics.jsonl")]
    assert len(captured.session.rows) == 8
    assert losses[-1] < 0.5 * losses[0]


def test_profile_writes_its_trace(make_config) -> None:
    config = make_config(
        "debug=profile", "report_to=none", "disable_tqdm=true", "gradient_accumulation_steps=1", small=False
    )
    run([config])
    assert (Path(config.output_dir) / "profile" / "trace.json").is_file()


def test_a_tracker_that_cannot_start_stops_the_run_unless_told_to_go_on(make_config, tmp_path: Path) -> None:
    """wandb refuses an unknown mode; with on_tracker_error=continue it is left out, and said."""
    broken = ["report_to=wandb", "tracker.wandb.project=a/b"]
    with pytest.raises(
        ConfigError, match=r"tracker\.wandb.*cannot start: .*[^.]\. Without an .*: WANDB_MODE=offline\. Train"
    ):
        run([make_config(*broken, "max_steps=1", output="stops")])
    config = make_config(*broken, "max_steps=1", "on_tracker_error=continue", output="goes")
    run([config])
    assert "tracker wandb cannot start and is left out" in (Path(config.output_dir) / "train.log").read_text()
    assert json.loads((Path(config.output_dir) / "manifest.json").read_text())["status"] == "completed"
