"""A kernel is used only where it computes what it replaces; the first attempt's and the main rank's choice holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import sftx.run
from sftx.errors import ModelError
from sftx.model import probe as probe_module
from sftx.model.adapt import AdaptedModel
from sftx.model.kernels import cross_entropy, liger
from sftx.model.probe import LIGER, TRITON, probe
from sftx.training import probing
from sftx.training.precision import Numerics

CPU = torch.device("cpu")
NUMERICS = Numerics(torch.float32, CPU)


class Gpu(str):
    """Says that it is a GPU, and is not."""

    type = "cuda"


@pytest.fixture
def model() -> AdaptedModel:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return AdaptedModel(Qwen2ForCausalLM(config), trained_dtype=torch.float32, gradient_checkpointing=False)


def choose(
    model: AdaptedModel, kernels: list[str], pinned: list[str] | None = None, from_main: Any = lambda v: v
) -> Any:
    return probe(model, NUMERICS, CPU, padding_free=False, kernels=kernels, pinned=pinned, from_main=from_main)


@pytest.fixture
def usable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every kernel be usable here, and Liger change nothing."""
    for name in ("kernel_unusable", "liger_unusable", "varlen_unusable"):
        monkeypatch.setattr(probe_module, name, lambda *_: None)
    monkeypatch.setattr(probe_module, "apply_liger", lambda _: None)


def test_kernels_that_can_be_used_are(model: AdaptedModel, usable: None) -> None:
    assert choose(model, [TRITON, LIGER]).kernels == [TRITON, LIGER]
    assert model.computes_losses
    assert model.network.loss_head is not None
    assert model.network.loss_head.triton
    assert choose(model, [LIGER]).kernels == [LIGER]
    assert not model.network.loss_head.triton


def test_a_kernel_that_cannot_be_used_is_named_with_its_reason(model: AdaptedModel) -> None:
    found = choose(model, [TRITON, LIGER])
    assert found.kernels == []
    assert found.unusable == {TRITON: "it needs an NVIDIA GPU", LIGER: "they need an NVIDIA GPU"}


def test_a_resumed_run_takes_no_kernel_that_it_began_without(model: AdaptedModel, usable: None) -> None:
    found = choose(model, [TRITON, LIGER], pinned=[LIGER])
    assert found.kernels == [LIGER]
    assert found.unusable == {TRITON: "the run began without it"}


def test_a_rank_that_lacks_the_main_rank_s_kernel_says_so(model: AdaptedModel) -> None:
    with pytest.raises(
        ModelError, match=r"main rank uses the kernel for cross entropy, but this rank cannot: it needs"
    ):
        choose(model, [TRITON], from_main=lambda _: [TRITON])


def test_a_rank_uses_no_kernel_that_the_main_rank_does_not(model: AdaptedModel, usable: None) -> None:
    assert choose(model, [TRITON], from_main=lambda _: []).kernels == []
    assert model.network.loss_head is not None
    assert not model.network.loss_head.triton


def test_liger_must_leave_the_logits_as_they_are(
    model: AdaptedModel, usable: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(module: Any) -> None:
        module.model.norm.weight.data *= 1.1

    monkeypatch.setattr(probe_module, "apply_liger", spoil)
    with pytest.raises(ModelError, match=r"change this model's logits by .*pip uninstall liger-kernel"):
        choose(model, [LIGER])


def test_without_the_package_liger_says_what_to_install(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "liger_kernel", None)
    assert liger.liger_unusable(model.module, Gpu()) == liger.MISSING  # type: ignore[arg-type]


def test_no_kernel_without_a_gpu() -> None:
    """Triton is missing, or finds no driver: torch computes it."""
    assert cross_entropy.kernel_unusable(CPU, torch.float32) == "it needs an NVIDIA GPU"
    assert cross_entropy.kernel_unusable(Gpu("cpu"), torch.float32)  # type: ignore[arg-type]
    logits, targets, found = torch.randn(3, 50), torch.tensor([1, 2, 3]), torch.empty(3)
    wanted = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    cross_entropy.losses(logits, targets, None, found, kernel=True)
    torch.testing.assert_close(found, wanted)


def test_a_resumed_run_keeps_the_kernels_that_were_chosen(make_config, captured, monkeypatch, usable) -> None:
    """The second attempt finds no kernel missing, yet goes on with those of the first: the same rounding."""
    asked: list[Any] = []
    real = probing.probe_model

    def as_on_a_gpu(*arguments: Any, kernels: Any, pinned: Any, **named: Any) -> Any:
        asked.append(pinned)
        first = pinned is None
        return real(*arguments, kernels=[TRITON] if first else [TRITON, LIGER], pinned=pinned, **named)

    monkeypatch.setattr(probing, "probe_model", as_on_a_gpu)
    for steps in (1, 2):
        sftx.run.run([make_config(f"max_steps={steps}", "save_strategy=steps", "save_steps=1", "eval_ratio=0")])
        assert captured.trial.step == steps, "it was continued"
        assert captured.trial.effective.settings["kernels"] == [TRITON], steps
    assert asked == [None, [TRITON]]
