"""The head's loss is the cross entropy of its logits, and its memory does not grow with them."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sftx.model import head as module
from sftx.model.head import LossHead, piece_rows

ROWS, WIDTH, WORDS = 70, 12, 50


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pieces of rows, and several blocks of the vocabulary, the last ones smaller."""
    monkeypatch.setitem(module.PIECE_BYTES, "cpu", 4 * WORDS * 20)
    monkeypatch.setattr(module, "CPU_COLUMNS", 16)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_loss_and_gradients_are_those_of_cross_entropy(trained: bool, bias: bool) -> None:
    torch.manual_seed(0)
    assert piece_rows(WORDS, torch.device("cpu")) == 20 < ROWS
    linear = nn.Linear(WIDTH, WORDS, bias=bias).requires_grad_(trained)
    hidden = (5 * torch.randn(ROWS, WIDTH)).requires_grad_()
    targets, weights = torch.randint(WORDS, (ROWS,)), torch.rand(ROWS)

    losses = F.cross_entropy(linear(hidden), targets, reduction="none")
    (0.3 * (losses * weights).sum()).backward()
    inputs = [hidden, *(p for p in linear.parameters() if trained)]
    wanted = [p.grad for p in inputs]
    for parameter in inputs:
        parameter.grad = None

    total, found = LossHead(linear)(hidden, targets, weights)
    (0.3 * total).backward()
    torch.testing.assert_close(found, losses.detach())
    torch.testing.assert_close(total.detach(), (losses * weights).sum().detach())
    for parameter, gradient in zip(inputs, wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-6)


def test_extreme_logits_stay_finite() -> None:
    linear = nn.Linear(1, 3, bias=False)
    linear.weight.data = torch.tensor([[-200.0], [0.0], [300.0]])
    hidden = torch.ones(2, 1, requires_grad=True)
    total, losses = LossHead(linear)(hidden, torch.tensor([0, 2]), torch.ones(2))
    total.backward()
    assert losses.tolist() == [500.0, 0.0]
    assert hidden.grad is not None
    assert hidden.grad.flatten().tolist() == [500.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(WIDTH, WORDS)
    hidden = torch.randn(ROWS, WIDTH, requires_grad=True)
    targets, weights = torch.randint(WORDS, (ROWS,)), torch.ones(ROWS)
    F.cross_entropy(linear(hidden), targets, reduction="sum").backward()
    wanted = [p.grad for p in (hidden, *linear.parameters())]
    hidden.grad = None
    linear.zero_grad()
    with torch.autocast("cpu", dtype=dtype):
        total, _ = LossHead(linear)(hidden, targets, weights)
    total.backward()
    for parameter, gradient in zip((hidden, *linear.parameters()), wanted, strict=True):
        assert parameter.grad is not None
        assert gradient is not None
        assert parameter.grad.dtype == torch.float32
        assert (parameter.grad - gradient).abs().max() < 0.02 * gradient.abs().max()


@pytest.mark.parametrize("weight", [1.0, 300.0, 1e-3])
def test_gradients_of_rows_that_agree_are_finite_in_fp16(weight: float) -> None:
    """The sum of a piece's rows is beyond 65,504 at the scale of their derivatives."""
    torch.manual_seed(0)
    linear = nn.Linear(WIDTH, WORDS)
    hidden = (8 + torch.randn(ROWS, WIDTH)).requires_grad_()
    targets, weights = torch.full((ROWS,), 7), torch.full((ROWS,), weight)
    weights[::2] /= 50
    (F.cross_entropy(linear(hidden), targets, reduction="none") * weights).sum().backward()
    wanted = [p.grad for p in (hidden, *linear.parameters())]
    hidden.grad = None
    linear.zero_grad()
    with torch.autocast("cpu", dtype=torch.float16):
        total, _ = LossHead(linear)(hidden, targets, weights)
    total.backward()
    for parameter, gradient in zip((hidden, *linear.parameters()), wanted, strict=True):
        assert parameter.grad is not None
        assert gradient is not None
        assert torch.linalg.vector_norm(parameter.grad - gradient) < 0.01 * torch.linalg.vector_norm(gradient)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return func(*args, **kwargs or {})


def test_without_a_gradient_a_trained_head_makes_only_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CPU_COLUMNS", WORDS)
    linear = nn.Linear(WIDTH, WORDS)
    with torch.no_grad(), Products() as products:
        LossHead(linear)(torch.randn(15, WIDTH), torch.randint(WORDS, (15,)), torch.ones(15))
    assert products.count == 1


def test_without_a_gradient_only_losses_are_made() -> None:
    linear = nn.Linear(WIDTH, WORDS)
    with torch.no_grad():
        total, losses = LossHead(linear)(torch.randn(ROWS, WIDTH), torch.randint(WORDS, (ROWS,)), torch.ones(ROWS))
    assert not total.requires_grad
    assert len(losses) == ROWS


def test_no_row_has_a_target() -> None:
    hidden = torch.randn(0, WIDTH, requires_grad=True)
    total, _ = LossHead(nn.Linear(WIDTH, WORDS))(hidden, torch.zeros(0, dtype=torch.long), torch.zeros(0))
    total.backward()
    assert total.item() == 0.0
    assert hidden.grad is not None


MEMORY = """
import re, torch
from pathlib import Path
from torch import nn
from sftx.model.head import LossHead
torch.set_num_threads(1)
def peak():  # of this process; ru_maxrss would include what its parent had
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
head = LossHead(nn.Linear(1024, 151_936, bias=False).requires_grad_(False))
hidden = torch.randn(1024, 1024, requires_grad=True)
targets, weights = torch.randint(151_936, (1024,)), torch.ones(1024)
hidden[:16] @ head.weight[:1000].t()  # the library's own buffers
before = peak()
head(hidden, targets, weights)[0].backward()
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_does_not_depend_on_the_vocabulary() -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert 1024 * int(done.stdout) < 100e6, "logits of 151,936 words for 1,024 tokens would be 622 MB"
