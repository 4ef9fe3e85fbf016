"""Runs on a GPU: optimizers of bitsandbytes, resuming, out of memory, host memory, profile, samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.gpu.cases import DEVICE, DRY_RUN, NOT_DRY, ON_A_GPU, fallbacks_of, losses, manifest

from sftx.run import run
from sftx.training import loop
from sftx.training.loss import token_losses
from sftx.training.measure import profile

pytestmark = ON_A_GPU


@NOT_DRY
@pytest.mark.parametrize("optimizer", ["paged_adamw_32bit", "paged_adamw_8bit", "adamw_8bit"])
def test_bitsandbytes_optimizers(make_config, captured, optimizer: str) -> None:
    config = make_config(f"optimizer={optimizer}", "max_steps=5")
    run([config])
    assert type(captured.trial.stepper.optimizer).__module__.startswith("bitsandbytes")
    assert captured.trial.stepper.optimizer.is_paged == optimizer.startswith("paged")
    assert not fallbacks_of(config, "optim")


@pytest.mark.parametrize(
    "typed",
    [
        ("mode=lora", "optim=adamw", "precision=fp16"),
        ("mode=full", "optim=adamw", "precision=bf16"),
        ("mode=qlora", "optim=paged_adamw_32bit", "precision=fp16"),
    ],
)
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(make_config, captured, typed: tuple[str, ...]) -> None:
    """Losses, the optimizer's state, the loss scale; paged state is paged again."""
    shared = [
        *typed, "scheduler=constant", "lora_dropout=0.1", "eval_ratio=0", "save_strategy=steps", "save_steps=3",
    ]  # fmt: skip
    run([whole := make_config(*shared, "max_steps=6", output="whole")])
    uninterrupted = captured.trial.stepper
    run([make_config(*shared, "max_steps=3", output="stopped")])
    run([resumed := make_config(*shared, "max_steps=6", output="stopped")])
    stepper = captured.trial.stepper
    assert losses(resumed) == pytest.approx(losses(whole), rel=5e-3)
    assert stepper.loss_scale == uninterrupted.loss_scale
    (state, _), (wanted, _) = stepper.state(), uninterrupted.state()
    assert state.keys() == wanted.keys()
    for name, tensor in state.items():
        bound = 0.05 * wanted[name].abs().max().item()
        torch.testing.assert_close(tensor, wanted[name], rtol=0.05, atol=bound, msg=lambda m, name=name: f"{name}: {m}")
    if "optim=paged_adamw_32bit" in typed and not DRY_RUN:
        moments = [t for s in stepper.optimizer.state.values() for t in s.values() if torch.is_tensor(t) and t.ndim]
        assert moments
        assert all(getattr(t, "is_paged", False) for t in moments if t.numel() >= 100_000)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_deterministic_run_is_resumed_to_the_last_bit(make_config, mode: str) -> None:
    """Attention's backward pass and the embedding's gradient sum in a fixed order then."""
    shared = [
        f"mode={mode}", "deterministic=true", "optim=adamw", "precision=bf16", "scheduler=constant", "lora_dropout=0.1",
        "eval_ratio=0", "save_strategy=steps", "save_steps=2", "per_device_train_batch_size=2",
    ]  # fmt: skip
    run([whole := make_config(*shared, "max_steps=4", output="whole")])
    run([make_config(*shared, "max_steps=2", output="stopped")])
    run([resumed := make_config(*shared, "max_steps=4", output="stopped")])
    for key in ("train/loss", "train/grad_norm"):
        assert losses(resumed, key) == losses(whole, key)


def test_the_micro_batch_is_halved_when_the_gpu_is_out_of_memory(
    make_config, captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The allocator itself raises, after the forward pass of more than two rows; the step's numbers stay the same."""

    def greedy(model, batch, device):
        found = token_losses(model, batch, device)
        if len(batch.lengths) > 2:
            torch.empty(2**50, dtype=torch.uint8, device=device)
        return found

    shared = ["mode=lora", "precision=fp32", "lora_dropout=0", "gradient_accumulation_steps=8", "eval_ratio=0"]
    run([plain := make_config(*shared, "per_device_train_batch_size=1", output="plain")])
    monkeypatch.setattr(loop, "token_losses", greedy)
    run([halved := make_config(*shared, "per_device_train_batch_size=auto", output="halved")])
    assert captured.trial.micro_batch == 2
    assert losses(halved) == pytest.approx(losses(plain), rel=1e-3)
    assert fallbacks_of(halved, "per_device_train_batch_size")


def test_activations_kept_in_host_memory_are_the_same(make_config) -> None:
    shared = ["mode=lora", "precision=fp32", "lora_dropout=0.1", "eval_ratio=0"]
    run([plain := make_config(*shared, "gradient_checkpointing=true", output="plain")])
    run([offloaded := make_config(*shared, "gradient_checkpointing=offload", output="offloaded")])
    assert losses(offloaded) == pytest.approx(losses(plain), rel=1e-3)
    assert bool(fallbacks_of(offloaded, "gradient_checkpointing")) == DRY_RUN


def test_a_profile_counts_each_kernel_once(make_config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of the counted kernels is that of the GPU's own events."""
    counted: list[float] = []
    parts_of, on_cpu = profile.parts_of, torch.autograd.DeviceType.CPU

    def watched(events):
        events = [e for e in events if not e.is_user_annotation]
        counted.append(sum(k.duration for e in events if e.device_type == on_cpu for k in e.kernels))
        counted.append(sum(e.self_device_time_total for e in events if e.device_type != on_cpu))
        return parts_of(events)

    monkeypatch.setattr(profile, "parts_of", watched)
    config = make_config("debug=profile", "max_steps=6")
    run([config])
    folder = Path(config.output_dir) / "profile"
    shares = json.loads((folder / "summary.json").read_text())["shares"]
    assert sum(shares.values()) == pytest.approx(1, abs=1e-2)
    assert {"attention", "head and loss"} <= shares.keys()
    assert (folder / "trace.json").is_file()
    if not DRY_RUN:
        assert counted[0] > 0
        assert counted[0] == pytest.approx(counted[1], rel=0.2)


@pytest.mark.parametrize("mode", ["qlora", "full"])
def test_evaluations_and_samples(make_config, captured, mode: str) -> None:
    """Both are made in half precision, between training steps, and leave the model on the GPU and in training mode."""
    config = make_config(
        f"mode={mode}", "precision=fp16", "callback=generate_samples", "callback.generate_samples.prompts=[你是谁？]",
        "callback.generate_samples.max_new_tokens=5", "eval_steps=2", "max_steps=4",
    )  # fmt: skip
    run([config])
    lines = (Path(config.output_dir) / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4]
    assert all(json.loads(line)["answer"] for line in lines)
    evaluated = losses(config, "eval/loss")
    assert len(evaluated) == 3
    assert evaluated[-1] != evaluated[0]
    assert evaluated == pytest.approx([evaluated[0]] * 3, rel=0.1)
    module = captured.session.model.module
    assert module.training
    assert next(module.parameters()).device.type == DEVICE.type
    assert manifest(config)["result"]["skipped_steps"] == 0
