"""Several GPUs, and ZeRO-3, each in processes of their own."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from tests.conftest import SMALL, TWO_RANKS, over
from tests.gpu.cases import DRY_RUN, ON_A_GPU, losses, manifest
from tests.invariance.test_invariance import weights

from sftx.run import run

SEVERAL = DRY_RUN or torch.cuda.device_count() >= 2
pytestmark = ON_A_GPU


@pytest.mark.skipif(not SEVERAL, reason="NCCL needs two GPUs")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_two_gpus_equal_one(make_config, cli, precision: str) -> None:
    """With NCCL; the last step of an epoch of 26 rows has none for the second GPU."""
    shared = [
        "mode=lora",
        "optim=adamw",
        "lora_dropout=0",
        f"precision={precision}",
        "max_train_rows=30",
        "max_steps=8",
    ]
    run([alone := make_config(*shared, "gradient_accumulation_steps=4", output="alone")])
    both = make_config(*shared, output="both")
    words = [*over(SMALL, *shared, "gradient_accumulation_steps=2"), f"output_dir={both.output_dir}", "parallel=ddp"]
    done = cli(*words, launcher=TWO_RANKS)
    assert done.returncode == 0, done.stderr[-3000:]
    rel = 1e-3 if precision == "fp32" else 1e-2
    assert losses(both) == pytest.approx(losses(alone), rel=rel)
    assert losses(both, "eval/loss") == pytest.approx(losses(alone, "eval/loss"), rel=rel)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_zero3_follows_one_process(make_config, cli, mode: str) -> None:
    """In bf16 with checkpointing, full mode stopped once; on one GPU it splits nothing, and runs the same code."""
    shared = [
        f"mode={mode}", "optimizer=adamw", "lora_dropout=0", "precision=bf16", "gradient_checkpointing=true",
        "learning_rate=1e-4", "save_strategy=steps", "gradient_accumulation_steps=4",
    ]  # fmt: skip
    run([alone := make_config(*shared, "max_steps=4", output="alone")])
    zero = make_config(*shared, "max_steps=4", output="zero")
    ranked = over(shared, "gradient_accumulation_steps=2") if SEVERAL else shared
    for stop in ("max_steps=2", "max_steps=4") if mode == "full" else ("max_steps=4",):
        words = [*over(SMALL, *ranked, stop), f"output_dir={zero.output_dir}", "parallel=zero3"]
        done = cli(*words, launcher=TWO_RANKS if SEVERAL else ())
        assert done.returncode == 0, done.stderr[-3000:]
    assert losses(zero) == pytest.approx(losses(alone), rel=2e-2)
    assert losses(zero, "eval/loss")[-1] == pytest.approx(losses(alone, "eval/loss")[-1], rel=2e-2)
    assert manifest(zero)["result"]["steps"] == 4
    assert all(torch.isfinite(t).all() for t in weights(Path(zero.output_dir)).values())
