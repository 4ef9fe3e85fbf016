"""What only a GPU can show: half precision with loss scaling, NF4 kernels, paged optimizers."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

from sftx.model import attention, compare, cross_entropy
from sftx.run import run
from sftx.runs.metrics import read_metrics
from sftx.training import loop

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU"),
]


def losses(config) -> list[float]:
    return [r["train/loss"] for r in read_metrics(Path(config.output_dir) / "metrics.jsonl") if "train/loss" in r]


@pytest.mark.parametrize("mode", ["lora", "qlora", "full"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_follows_fp32(make_config, captured, mode: str, precision: str) -> None:
    """The same run in half precision on the GPU: close to fp32, with a loss scaler for fp16 only."""
    half = make_config(f"mode={mode}", f"precision={precision}", "max_steps=5", output="half")
    run([half])
    assert captured.session.numerics.dtype == {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    assert captured.trial.stepper.scaler.is_enabled() == (precision == "fp16")
    assert captured.session.engine.device.type == "cuda"
    full = make_config(f"mode={mode}", "precision=fp32", "max_steps=5", output="full")
    run([full])
    assert losses(half) == pytest.approx(losses(full), rel=2e-2)


def test_an_overflow_lowers_the_scale_and_skips_the_step(
    make_config, captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp16's scaler halves its scale on an infinite gradient, and the run goes on."""
    config = make_config("mode=full", "precision=fp16", "max_steps=4", "learning_rate=1e-5")
    monkeypatch.setattr(torch.amp.GradScaler, "__init__", _huge_scale(torch.amp.GradScaler.__init__))
    run([config])
    assert captured.trial.stepper.scaler.get_scale() < 2.0**40
    assert captured.trial.step == 4


def _huge_scale(init):
    def start(self, *args, **kwargs):
        init(self, *args, **kwargs | {"init_scale": 2.0**40})

    return start


@pytest.mark.parametrize("optimizer", ["paged_adamw_32bit", "paged_adamw_8bit", "adamw_8bit"])
def test_bitsandbytes_optimizers(make_config, captured, optimizer: str) -> None:
    config = make_config(f"optimizer={optimizer}", "max_steps=5")
    run([config])
    assert type(captured.trial.stepper.optimizer).__module__.startswith("bitsandbytes")
    assert captured.trial.stepper.optimizer.is_paged == optimizer.startswith("paged")
    fallbacks = json.loads((Path(config.output_dir) / "manifest.json").read_text())["effective"]["fallbacks"]
    assert not [f for f in fallbacks if f["key"] == "optim"]


def test_dropout_masks_survive_checkpointing(make_config) -> None:
    shared = ["lora_dropout=0.3", "precision=fp32", "max_steps=3"]
    runs = [make_config(*shared, f"gradient_checkpointing={on}", output=str(on)) for on in (False, True)]
    for config in runs:
        run([config])
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-6)


def settings_of(config) -> dict:
    return json.loads((Path(config.output_dir) / "manifest.json").read_text())["effective"]["settings"]


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_the_fast_ways_are_taken_and_give_the_same(make_config, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """One attention call for all rows, one kernel for cross entropy; Liger's where it is installed."""
    shared = [f"mode={mode}", "precision=bf16", "max_steps=5", "lora_dropout=0"]
    monkeypatch.setattr(compare, "CLEARLY", math.inf)  # for so small a model a kernel may be slower
    fast = make_config(*shared, output="fast")
    run([fast])
    found = settings_of(fast)
    assert found["attn_implementation"] == "varlen"
    liger = ["SwiGLU", "rotation"] if importlib.util.find_spec("liger_kernel") else []
    assert found["kernels"] == ["cross entropy", *liger]
    monkeypatch.setattr("sftx.run._use_kernels", lambda *_: cross_entropy.__dict__.update(_uses_kernel=False))
    plain = make_config(*shared, "attn_implementation=sdpa", output="plain")
    run([plain])
    assert not attention._together
    assert settings_of(plain)["attn_implementation"] == "sdpa"
    assert losses(fast) == pytest.approx(losses(plain), rel=5e-3)


def test_a_kernel_is_timed_beside_what_it_stands_for() -> None:
    device = torch.device("cuda")
    small, large = (torch.randn(n, n, device=device) for n in (256, 4096))
    assert compare.slower((lambda: small @ small, lambda: large @ large), device) is None
    assert "ms here" in str(compare.slower((lambda: large @ large, lambda: small @ small), device))


@pytest.mark.parametrize(
    "typed",
    [("mode=lora", "precision=bf16"), ("mode=lora", "precision=fp16"), ("mode=qlora", "gradient_checkpointing=true")],
)
def test_the_host_never_waits_between_records(make_config, monkeypatch: pytest.MonkeyPatch, typed) -> None:
    """Anything that makes the host wait for the GPU raises in these steps."""
    advance, watched = loop._advance, []

    def watching(session, trial) -> None:
        if trial.step not in (3, 4, 5):
            return advance(session, trial)
        watched.append(trial.step)
        torch.cuda.set_sync_debug_mode("error")
        try:
            advance(session, trial)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(loop, "_advance", watching)
    run([make_config("optim=adamw", *typed, "max_steps=8", "logging_steps=8", "eval_ratio=0")])
    assert watched == [3, 4, 5]
