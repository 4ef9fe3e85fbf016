"""The optimizer steps of parameters that every rank holds whole, without a run around them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sftx.parallel.stepper import Stepper

bitsandbytes = pytest.importorskip("bitsandbytes")


def paged(kind: type, parameters: dict[str, torch.nn.Parameter]) -> Any:
    """Return an optimizer of bitsandbytes whose large states are marked as paged, as they are on a GPU."""

    class Paged(kind):  # type: ignore[misc]
        def get_state_buffer(self, p: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            buffer: Any = torch.zeros_like(p, dtype=dtype)
            if p.numel() >= 1e5:
                buffer.is_paged = True
                self.page_mng.paged_tensors.append(buffer)
            return buffer

    optimizer = Paged(parameters.values(), lr=1e-2)
    optimizer.is_paged = True
    optimizer.page_mng.paged_tensors.clear()
    return optimizer


def stepped(stepper: Stepper, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in stepper.parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    stepper.step(1e-2)


def two_parameters() -> dict[str, torch.nn.Parameter]:
    torch.manual_seed(0)
    return {"large": torch.nn.Parameter(torch.randn(400, 300)), "small": torch.nn.Parameter(torch.randn(30))}


@pytest.mark.parametrize("kind", ["AdamW32bit", "AdamW8bit", "Lion32bit"])
def test_a_paged_state_that_is_restored_is_paged(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a resume into new buffers, after a rollback into those that are there: managed memory is never freed."""
    monkeypatch.setattr(bitsandbytes.optim.optimizer.Optimizer8bit, "prefetch_state", lambda self, p: None)
    parameters = two_parameters()
    first = Stepper(parameters, paged(getattr(bitsandbytes.optim, kind), parameters), torch.float32, 0)
    stepped(first, 1)
    kept, (tensors, rest) = first.weights(), first.state()
    stepped(first, 2)
    wanted = first.weights()

    parameters = two_parameters()
    optimizer = paged(getattr(bitsandbytes.optim, kind), parameters)
    second = Stepper(parameters, optimizer, torch.float32, 0)
    for attempt in ("resume", "rollback"):
        second.load_weights(kept)
        second.load_state({key: tensor.clone() for key, tensor in tensors.items()}, rest)
        state = optimizer.state[parameters["large"]]
        names = [name for name in ("state1", "state2") if name in state]
        assert names
        assert all(getattr(state[name], "is_paged", False) for name in names), attempt
        assert len(optimizer.page_mng.paged_tensors) == len(names), attempt
        stepped(second, 2)
        found = second.weights()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), attempt
