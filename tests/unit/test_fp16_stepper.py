"""Steps in fp16: the loss scaler, and the flags that forbid a step."""

from __future__ import annotations

import math

import pytest
import torch

from sftx.parallel.stepper import Stepper

OPTIMIZERS = {
    "fused": lambda p: torch.optim.AdamW([p], lr=0.1, fused=True),
    "plain": lambda p: torch.optim.SGD([p], lr=0.1, momentum=0.9),
}


def stepper_of(kind: str, **options: object) -> tuple[Stepper, torch.nn.Parameter]:
    parameter = torch.nn.Parameter(torch.ones(3))
    return Stepper({"w": parameter}, OPTIMIZERS[kind](parameter), torch.float16, 1.0, **options), parameter


@pytest.mark.parametrize(
    ("kind", "apply"), [("plain", False), ("fused", False), ("fused", torch.tensor(False))], ids=str
)
def test_a_step_that_is_forbidden_changes_nothing(kind: str, apply: bool | torch.Tensor) -> None:
    stepper, parameter = stepper_of(kind)
    stepper.backward(parameter.sum(), last=True)
    assert stepper.step(0.1, apply=apply).item() == pytest.approx(math.sqrt(3))
    assert parameter.tolist() == [1, 1, 1]
    assert stepper.loss_scale == 2.0**16, "its gradient is finite"
    stepper.backward(parameter.sum(), last=True)
    stepper.step(0.1)
    assert parameter.tolist() != [1, 1, 1]


@pytest.mark.parametrize(("kind", "apply"), [("plain", True), ("fused", True), ("fused", torch.tensor(True))], ids=str)
def test_weights_stay_finite_however_many_gradients_are_not(kind: str, apply: bool | torch.Tensor) -> None:
    """After 165 of them the scale is 0, and its inverse infinite."""
    stepper, parameter = stepper_of(kind)
    for _ in range(200):
        stepper.backward(parameter.sum() * torch.inf, last=True)
        assert not math.isfinite(stepper.step(0.1, apply=apply).item())
    stepper.backward(parameter.sum(), last=True)
    stepper.step(0.1, apply=apply)
    assert parameter.tolist() == [1, 1, 1]


def test_a_rank_without_rows_in_its_first_step() -> None:
    """It has scaled no loss yet; its gradients are what the others sum up."""

    def from_others(parameters: object) -> None:
        for p in parameters:  # type: ignore[attr-defined]
            p.grad = torch.full_like(p, 2.0**16)

    stepper, parameter = stepper_of("plain", sum_gradients=from_others)
    assert stepper.step(0.1).item() == pytest.approx(math.sqrt(3))
    assert parameter.tolist() != [1, 1, 1]
