"""Whether a short way gives what the long one gives: how what may be used instead of something is tried."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Of the largest value: what another order of rounding may differ by."""


def differ(found: Iterable[torch.Tensor], wanted: Iterable[torch.Tensor], dtype: torch.dtype) -> str | None:
    """Return by how much tensors differ, if it is more than rounding explains."""
    for one, other in zip(found, wanted, strict=True):
        difference = (one.float() - other.float()).abs().max().item()
        if not difference <= TOLERANCE[dtype] * max(1.0, other.float().abs().max().item()):
            return f"its result differs by {difference:.2g}"
    return None


def reason_of(trial: Callable[[], str | None]) -> str | None:
    """Return what a trial says, or the first line of what it raises: a compiler or a driver may be missing."""
    try:
        return trial()
    except Exception as error:  # noqa: BLE001 - compilers and drivers fail each in their own way
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
