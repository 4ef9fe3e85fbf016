"""What a device cannot compute in is said, and not done silently."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from sftx.effective import Effective
from sftx.training.precision import Numerics, Precision


@pytest.mark.parametrize(
    ("precision", "keys"),
    [
        (Precision("float32", tf32=False), []),
        (Precision("float32", tf32=True), ["precision.tf32"]),
        (Precision("float16", tf32=True), ["fp16", "precision.tf32"]),
        (Precision("bfloat16", tf32=False), ["bf16"]),
    ],
)
def test_a_cpu_computes_in_fp32_and_says_so(precision: Precision, keys: list[str]) -> None:
    effective = Effective()
    assert precision.resolve(torch.device("cpu"), effective, sharded=False).dtype == torch.float32
    assert [f.key for f in effective.fallbacks] == keys


def test_sharded_weights_are_not_cast() -> None:
    """DeepSpeed computes in the weights' own format: it warns of an autocast around it, and turns that off."""
    for dtype in (torch.float16, torch.bfloat16):
        assert isinstance(Numerics(dtype, torch.device("cpu")).autocast(), torch.autocast)
    numerics = Precision("float16", tf32=False).resolve(torch.device("cuda"), Effective(), sharded=True)
    assert isinstance(numerics.autocast(), nullcontext)
