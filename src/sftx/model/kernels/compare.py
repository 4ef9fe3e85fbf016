"""Whether a kernel computes what it replaces."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Of the largest value: what another order of rounding may differ by."""


def difference(found: Iterable[torch.Tensor], wanted: Iterable[torch.Tensor], dtype: torch.dtype) -> str | None:
    """Return by how much tensors differ, if it is more than rounding explains."""
    for one, other in zip(found, wanted, strict=True):
        largest = (one.float() - other.float()).abs().max().item()
        if not largest <= TOLERANCE[dtype] * max(1.0, other.float().abs().max().item()):
            return f"its result differs by {largest:.2g}"
    return None


def reason_of(check: Callable[[], str | None]) -> str | None:
    """Return what a check returns, or the first line of what it raises: a compiler or a driver may be missing."""
    try:
        return check()
    except Exception as error:  # noqa: BLE001 - compilers and drivers fail each in their own way
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
