"""Numbers on a GPU: half precision with loss scaling, steps that must not be made, dropout, padding, accumulation."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tests.faults.test_not_finite import break_step, infinite_gradient, infinite_loss_alone, nan_loss, weights
from tests.gpu.cases import DEVICE, DRY_RUN, HALF, ON_A_GPU, losses, manifest, random_model
from tests.invariance.test_invariance import curve

from sftx.model.lora.dropout import Clock
from sftx.parallel.stepper import Stepper
from sftx.run import run
from sftx.training import recovery

pytestmark = ON_A_GPU
STEP_BY_STEP = ("mode=lora", "eval_ratio=0", "save_strategy=steps", "save_steps=1", "save_total_limit=null")
TOLERATED = 1e-4
"""What the order of a GPU's sums may change."""


@pytest.mark.parametrize("mode", ["lora", "qlora", "full"])
def test_half_precision_follows_fp32(make_config, captured, mode: str) -> None:
    """Training and evaluation are close to fp32; fp16 alone has a loss scaler, which never had to skip a step."""
    full = make_config(f"mode={mode}", "precision=fp32", "max_steps=5", output="full")
    run([full])
    for precision, dtype in HALF.items():
        half = make_config(f"mode={mode}", f"precision={precision}", "max_steps=5", output=precision)
        run([half])
        assert captured.session.numerics.dtype == dtype
        assert captured.trial.stepper.scales_loss == (precision == "fp16")
        assert captured.session.engine.device.type == DEVICE.type
        assert losses(half) == pytest.approx(losses(full), rel=2e-2)
        assert losses(half, "eval/loss") == pytest.approx(losses(full, "eval/loss"), rel=2e-2)
        assert manifest(half)["result"]["skipped_steps"] == 0


def test_all_weights_of_a_model_with_large_activations_train_in_fp16(make_config, tmp_path: Path, captured) -> None:
    """As a pretrained model's: the head's weight gradient, summed in fp16, overflows there at any loss scale."""
    size = (128, 256) if DRY_RUN else (768, 2048)
    shape = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= dict(zip(("hidden_size", "intermediate_size"), size, strict=True))
    model = random_model(tmp_path / "model", torch.float32, final_norm=16.0, **shape)
    shared = [
        "mode=full", f"model_name_or_path={model}", "max_steps=10", "learning_rate=2e-6", "max_seq_length=512",
        "per_device_train_batch_size=8", "gradient_accumulation_steps=1", "max_grad_norm=1.0",
    ]  # fmt: skip
    full, half = (make_config(*shared, f"precision={p}", output=p) for p in ("fp32", "fp16"))
    run([full])
    run([half])
    assert captured.trial.stepper.scales_loss
    assert manifest(half)["result"]["skipped_steps"] <= 6, "the scale starts at 2^16, which may be too large"
    assert losses(half) == pytest.approx(losses(full), rel=2e-2)
    norms = [losses(config, "train/grad_norm")[-3:] for config in (half, full)]
    assert norms[0] == pytest.approx(norms[1], rel=0.1)
    first, last = losses(half, "eval/loss")
    assert last < first


def test_an_overflow_lowers_the_scale_and_skips_the_step(
    make_config, captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp16's scaler halves its scale on an infinite gradient, and the run goes on."""
    config = make_config("mode=full", "precision=fp16", "max_steps=4", "learning_rate=1e-5", "eval_ratio=0")
    monkeypatch.setattr(torch.amp.GradScaler, "__init__", _huge_scale(torch.amp.GradScaler.__init__))
    run([config])
    assert captured.trial.stepper.loss_scale < 2.0**40
    assert manifest(config)["result"]["skipped_steps"] > 0
    assert captured.trial.step == 4


def _huge_scale(init):
    def start(self, *args, **kwargs):
        init(self, *args, **kwargs | {"init_scale": 2.0**40})

    return start


@pytest.mark.parametrize(
    ("precision", "spoil"),
    [("bf16", nan_loss), ("bf16", infinite_gradient), ("fp16", nan_loss), ("fp16", infinite_loss_alone)],
)
def test_a_step_that_is_not_finite_is_masked_on_the_device(
    make_config, captured, monkeypatch: pytest.MonkeyPatch, precision: str, spoil
) -> None:
    """The fused optimizer is given a flag on the device, and changes nothing."""
    step, flags = Stepper.step, []

    def watched(self, rate, *, apply=True):
        flags.append(apply.device.type if isinstance(apply, torch.Tensor) else "host")
        return step(self, rate, apply=apply)

    monkeypatch.setattr(Stepper, "step", watched)
    break_step(monkeypatch, captured, spoil, 3)
    config = make_config(*STEP_BY_STEP, "optim=adamw", f"precision={precision}", "on_nonfinite=skip", "max_steps=4")
    run([config])
    assert flags == [DEVICE.type] * 4
    assert _unchanged(config, 2, 3, 4) == [True, False]
    assert manifest(config)["result"]["skipped_steps"] == 1


def test_a_spike_is_not_learned_from_in_fp16(make_config, monkeypatch: pytest.MonkeyPatch, captured) -> None:
    monkeypatch.setattr(recovery, "EMA_WARMUP_STEPS", 2)
    monkeypatch.setattr(recovery, "LEAST_RISE", 1.0)
    break_step(monkeypatch, captured, lambda f: f._replace(weighted_sum=f.weighted_sum * 50), 4)
    config = make_config(*STEP_BY_STEP, "optim=adamw", "precision=fp16", "on_loss_spike=skip", "max_steps=5")
    run([config])
    assert _unchanged(config, 3, 4, 5) == [True, False]
    assert captured.trial.faults.skipped == 1


def _unchanged(config, *steps: int) -> list[bool]:
    """Return for each two steps, one after the other, whether the weights stayed the same."""
    saved = [weights(Path(config.output_dir) / "checkpoints" / f"step-{n:06d}") for n in steps]
    return [all(torch.equal(a[k], b[k]) for k in a) for a, b in pairwise(saved)]


def test_dropout_masks_survive_checkpointing(make_config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within what the order of a GPU's sums changes; other masks change ten times as much."""
    shared = ["mode=lora", "lora_dropout=0.3", "precision=fp32", "max_steps=3", "eval_ratio=0"]
    off, on, other = (
        make_config(*shared, f"gradient_checkpointing={how != 'off'}", output=how) for how in ("off", "on", "other")
    )
    run([off])
    run([on])
    _close(on, off, rel=TOLERATED)
    draws = iter(range(10**9))  # the recomputation draws other masks than the first pass
    monkeypatch.setattr(Clock, "step", property(lambda self: next(draws), lambda self, value: None), raising=False)
    run([other])
    with pytest.raises(AssertionError):
        _close(other, off, rel=10 * TOLERATED)


def test_padding_changes_nothing(make_config) -> None:
    """Four rows a batch, then one a batch: padding has no part in attention, loss or gradient."""
    shared = ["mode=lora", "precision=fp32", "lora_dropout=0", "eval_ratio=0", "batching=padded"]
    padded, single = (
        make_config(*shared, f"per_device_train_batch_size={n}", f"gradient_accumulation_steps={4 // n}", output=str(n))
        for n in (4, 1)
    )
    run([padded])
    run([single])
    _close(padded, single, rel=1e-3)


def _close(one, other, *, rel: float) -> None:
    """Assert that losses and gradient norms of two runs agree."""
    a, b = (torch.tensor(curve(Path(config.output_dir))) for config in (one, other))
    torch.testing.assert_close(a, b, rtol=rel, atol=0)
