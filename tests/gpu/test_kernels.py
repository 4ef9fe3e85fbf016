"""Kernels that only a GPU runs: they are taken, give the same, and never let the host wait."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from tests.gpu.cases import DEVICE, DRY_RUN, NOT_DRY, ON_A_GPU, fallbacks_of, losses, random_model, settings_of

from sftx.model.kernels.attention import VARLEN
from sftx.model.kernels.compiled import missing_for_compiling
from sftx.model.probe import LIGER, TRITON
from sftx.run import run
from sftx.training import loop

pytestmark = ON_A_GPU
WIDE = {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4}
"""Qwen2.5-7B's layers: heads of 128."""
DRY_WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a model of two of a 7B's layers, in bf16 as such models are published."""
    shape = DRY_WIDE if DRY_RUN else WIDE
    return random_model(tmp_path_factory.mktemp("wide") / "model", torch.bfloat16, num_hidden_layers=2, **shape)


@NOT_DRY
@pytest.mark.parametrize(("mode", "is_wide"), [("lora", False), ("full", False), ("lora", True)])
def test_the_fast_ways_are_taken_and_give_the_same(
    make_config, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, mode: str, is_wide: bool
) -> None:
    """One attention call for all rows, one kernel for cross entropy; Liger's where it is installed."""
    shared = [f"mode={mode}", "precision=bf16", "max_steps=5", "lora_dropout=0", "per_device_train_batch_size=4"]
    if is_wide:
        shared += [f"model_name_or_path={request.getfixturevalue('wide')}", "max_seq_length=256", "learning_rate=1e-4"]
    fast = make_config(*shared, output="fast")
    run([fast])
    found = settings_of(fast)
    assert found["attn_implementation"] == "varlen"
    liger = [LIGER] if importlib.util.find_spec("liger_kernel") else []
    assert found["kernels"] == [VARLEN, TRITON, *liger]
    monkeypatch.setattr("sftx.run.kernels_of", lambda _: [])
    plain = make_config(*shared, "attn_implementation=sdpa", output="plain")
    run([plain])
    assert settings_of(plain)["attn_implementation"] == "sdpa"
    assert losses(fast) == pytest.approx(losses(plain), rel=5e-3)


@pytest.mark.parametrize("mode", ["lora", "qlora"])
def test_layers_of_a_7b_follow_fp32(make_config, captured, wide: str, mode: str) -> None:
    """Heads of 128, wide products and NF4 kernels, with checkpointing and a micro-batch of several rows."""
    shared = [
        f"mode={mode}", f"model_name_or_path={wide}", "max_steps=3", "max_seq_length=256", "learning_rate=1e-4",
        "per_device_train_batch_size=auto", "gradient_checkpointing=true", "eval_ratio=0",
    ]  # fmt: skip
    run([full := make_config(*shared, "precision=fp32", output="fp32")])
    for precision in ("bf16", "fp16"):
        run([half := make_config(*shared, f"precision={precision}", output=precision)])
        assert losses(half) == pytest.approx(losses(full), rel=2e-2)
        assert losses(half, "train/grad_norm") == pytest.approx(losses(full, "train/grad_norm"), rel=0.1)
    config = captured.session.model.module.config
    assert config.hidden_size // config.num_attention_heads == 128
    assert captured.trial.micro_batch == 4


def test_compiled_training_is_the_same(make_config) -> None:
    if reason := missing_for_compiling(DEVICE, sharded=False):
        pytest.skip(reason)
    shared = ["mode=lora", "precision=fp32", "lora_dropout=0", "gradient_checkpointing=true", "eval_ratio=0"]
    run([plain := make_config(*shared, output="plain")])
    run([compiled := make_config(*shared, "compile=true", output="compiled")])
    assert settings_of(compiled)["compile"] is True
    assert not fallbacks_of(compiled, "compile")
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-3)


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
        if not DRY_RUN:
            torch.cuda.set_sync_debug_mode("error")
        try:
            advance(session, trial)
        finally:
            if not DRY_RUN:
                torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(loop, "_advance", watching)
    run([make_config("optim=adamw", *typed, "max_steps=8", "logging_steps=8", "eval_ratio=0")])
    assert watched == [3, 4, 5]
