"""Cross entropies of rows of logits, and what they change by, in place of the logits.

On a GPU one Triton kernel reads a row once for its sum and once for its gradient: every pass over the logits of a large
vocabulary costs there. (Liger's kernel reads a count back to the host and has no weights.) Elsewhere torch computes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch

from sftx.model.kernels.compare import difference, reason_of

CACHED = 2**17
"""Logits that a thread works on at a time on a CPU: four rows of a vocabulary of 32,000."""


def kernel_unusable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the Triton kernel cannot be used here, or None."""
    return reason_of(lambda: _compare(device, dtype)) if device.type == "cuda" else "it needs an NVIDIA GPU"


def losses(
    logits_PV: torch.Tensor,
    targets_P: torch.Tensor,
    weights_P: torch.Tensor | None,
    losses_P: torch.Tensor,
    *,
    kernel: bool,
) -> torch.Tensor:
    """Write the cross entropies, fp32; with weights, return the derivatives of the weighted ones.

    The logits are lost. The derivatives are fp32, or of the logits' format.
    """
    if kernel and logits_PV.is_cuda:
        return _by_kernel(logits_PV, targets_P, weights_P, losses_P)
    return _by_torch(logits_PV.float(), targets_P, weights_P, losses_P)


def _by_torch(
    logits_PV: torch.Tensor, targets_P: torch.Tensor, weights_P: torch.Tensor | None, losses_P: torch.Tensor
) -> torch.Tensor:
    targets_P1 = targets_P[:, None]
    of_target_P1 = logits_PV.gather(1, targets_P1)
    largest_P1, sums_P1 = torch.empty_like(of_target_P1), torch.empty_like(of_target_P1)
    weights_P1 = torch.zeros_like(of_target_P1) if weights_P is None else weights_P[:, None]
    for logits, largest, total, weights in _nearby(logits_PV, largest_P1, sums_P1, weights_P1):
        torch.amax(logits, 1, keepdim=True, out=largest)
        torch.sum(logits.sub_(largest).exp_(), 1, keepdim=True, out=total)
        if weights_P is not None:
            logits.mul_(weights / total)
    losses_P.copy_((sums_P1.log() + largest_P1 - of_target_P1)[:, 0])
    return logits_PV if weights_P is None else logits_PV.scatter_add_(1, targets_P1, -weights_P1)


def _nearby(first_PV: torch.Tensor, *others: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Split tensors alike, a few rows at a time: what is passed over again is in a core's own cache, not in memory."""
    on_cpu = first_PV.device.type == "cpu"  # on a GPU a call costs more than it saves
    rows = CACHED * torch.get_num_threads() // first_PV.shape[1] if on_cpu else len(first_PV)
    return zip(*(x.split(max(1, rows)) for x in (first_PV, *others)), strict=True)


def _by_kernel(
    logits_PV: torch.Tensor, targets_P: torch.Tensor, weights_P: torch.Tensor | None, losses_P: torch.Tensor
) -> torch.Tensor:
    rows, vocabulary = logits_PV.shape
    targets_P, own_P = targets_P.contiguous(), torch.empty(rows, device=logits_PV.device)
    weights = targets_P if weights_P is None else weights_P.float().contiguous()
    if rows:
        block = min(8192, 1 << (vocabulary - 1).bit_length())
        _kernel()[(rows,)](
            logits_PV, targets_P, weights, own_P, logits_PV.stride(0), vocabulary,
            WANTS_SLOPE=weights_P is not None, BLOCK=block, num_warps=16 if block == 8192 else 4,
        )  # fmt: skip
    losses_P.copy_(own_P)
    return logits_PV


@cache
def _kernel() -> Any:
    """Return the kernel: a program a row, which goes over the row once for its sum and once for its slope."""
    import triton
    import triton.language as tl

    def cross_entropy(  # type: ignore[no-untyped-def]
        logits, targets, weights, losses, stride, vocabulary, WANTS_SLOPE: tl.constexpr, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        logits += row * stride
        target = tl.load(targets + row)
        of_target = tl.load(logits + target).to(tl.float32)
        largest = -float("inf")
        total = 0.0
        for start in range(0, vocabulary, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(logits + at, mask=at < vocabulary, other=-float("inf")).to(tl.float32)
            larger = tl.maximum(largest, tl.max(x, 0))
            total = total * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger), 0)
            largest = larger
        tl.store(losses + row, tl.log(total) + largest - of_target)
        if WANTS_SLOPE:
            weight = tl.load(weights + row)
            for start in range(0, vocabulary, BLOCK):
                at = start + tl.arange(0, BLOCK)
                x = tl.load(logits + at, mask=at < vocabulary, other=0.0).to(tl.float32)
                slope = tl.exp(x - largest) / total - tl.where(at == target, 1.0, 0.0)
                tl.store(logits + at, slope * weight, mask=at < vocabulary)

    globals()["tl"] = tl  # Triton looks a kernel's names up in its module
    return triton.jit(cross_entropy)


def _compare(device: torch.device, dtype: torch.dtype) -> str | None:
    generator = torch.Generator(device).manual_seed(0)
    rows, vocabulary = 5, 20_011
    logits = 4 * torch.randn(rows, vocabulary, device=device, dtype=dtype, generator=generator)
    targets = torch.randint(vocabulary, (rows,), device=device, generator=generator)
    weights = torch.rand(rows, device=device, generator=generator)
    found = [torch.empty(rows, device=device) for _ in range(3)]
    slope = _by_kernel(logits.clone(), targets, weights, found[0])
    _by_kernel(logits.clone(), targets, None, found[1])
    wanted = _by_torch(logits.float(), targets, weights, found[2])
    return difference((slope, *found[:2]), (wanted, found[2], found[2]), dtype)
