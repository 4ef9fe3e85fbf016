"""Whether a short way gives what the long one gives, and is one: how what may be used instead of something is tried."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Of the largest value: what another order of rounding may differ by."""
TIMED_ROWS = 2048
"""Tokens of a batch on which two ways are timed."""
CLEARLY = 1.1
"""Times as long: what is slower by less is no reason, so that two runs on one machine do not differ."""


def differ(found: Iterable[torch.Tensor], wanted: Iterable[torch.Tensor], dtype: torch.dtype) -> str | None:
    """Return by how much tensors differ, if it is more than rounding explains."""
    for one, other in zip(found, wanted, strict=True):
        difference = (one.float() - other.float()).abs().max().item()
        if not difference <= TOLERANCE[dtype] * max(1.0, other.float().abs().max().item()):
            return f"its result differs by {difference:.2g}"
    return None


def slower(ways: Iterable[Callable[[], object]], device: torch.device) -> str | None:
    """Return by how much a kernel is slower than what it stands for, if it clearly is; asked of a GPU only.

    With `deterministic=true` nothing is timed: the choice would change the rounding from run to run.
    """
    if device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        return None
    one, other = map(milliseconds, ways)
    return f"it takes {one:.2g} ms here, without it {other:.2g}" if one > CLEARLY * other else None


def milliseconds(function: Callable[[], object], passes: int = 10) -> float:
    """Return what a call takes on this GPU, the least of three rounds."""
    for _ in range(3):  # compiled and chosen at the first ones
        function()
    rounds = []
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(passes):
            function()
        end.record()
        end.synchronize()
        rounds.append(start.elapsed_time(end) / passes)
    return min(rounds)


def both_passes(function: Callable[..., Any], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return what a function gives and the gradients of the sum of its squares; it may write over what it is given."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    outs = function(*(leaf * 1 for leaf in leaves))
    outs = outs if isinstance(outs, tuple) else (outs,)
    given = [out.detach().clone() for out in outs]
    return (*given, *torch.autograd.grad(outs, leaves, [2 * out for out in given]))


def reason_of(trial: Callable[[], str | None]) -> str | None:
    """Return what a trial says, or the first line of what it raises: a compiler or a driver may be missing."""
    try:
        return trial()
    except Exception as error:  # noqa: BLE001 - compilers and drivers fail each in their own way
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
