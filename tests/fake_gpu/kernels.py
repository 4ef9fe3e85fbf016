"""sftx's Triton kernel without a GPU: compiled for NVIDIA's architectures, or run by Triton's interpreter.

    python -m tests.fake_gpu.kernels compile
    TRITON_INTERPRET=1 python -m tests.fake_gpu.kernels interpret

Both end with a traceback at the first thing that is wrong.
"""

from __future__ import annotations

import itertools
import sys

import torch
from torch.nn import functional as F

from sftx.model.kernels import cross_entropy

CAPABILITIES = (75, 80, 90)
LOGITS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
VOCABULARIES = (50, 8192, 20_011)
"""Less than a block, just one, and several with a remainder."""


def compile_all() -> None:
    """Compile every variant that a run may launch, down to the machine code of ptxas."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = cross_entropy._kernel()
    for capability, logits, wants_slope in itertools.product(CAPABILITIES, LOGITS, (True, False)):
        for block, warps in ((8192, 16), (64, 4)):
            weights = "*fp32" if wants_slope else "*i64"  # without weights the targets are handed over again
            signature = {
                "logits": f"*{logits}", "targets": "*i64", "weights": weights, "losses": "*fp32",
                "stride": "i32", "vocabulary": "i32", "WANTS_SLOPE": "constexpr", "BLOCK": "constexpr",
            }  # fmt: skip
            source = ASTSource(kernel, signature, {"WANTS_SLOPE": wants_slope, "BLOCK": block})
            compiled = triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": warps})
            assert f".target sm_{capability}" in compiled.asm["ptx"]
            print(f"sm_{capability} {logits} {wants_slope} {block}: {len(compiled.asm['cubin'])} bytes", flush=True)


def interpret_all() -> None:
    """Compare losses and derivatives with those of torch's own cross entropy, by autograd."""
    for dtype in LOGITS.values():
        assert cross_entropy._compare(torch.device("cpu"), dtype) is None  # what decides on a GPU
        for vocabulary in VOCABULARIES:
            _compare(dtype, vocabulary)
            print(f"{dtype} {vocabulary}: equal", flush=True)


def _compare(dtype: torch.dtype, vocabulary: int, rows: int = 4) -> None:
    generator = torch.Generator().manual_seed(0)
    padded = 20 * torch.randn(rows, vocabulary + 3, generator=generator)  # rows lie further apart than they are long
    padded[0, 1] = 30_000.0
    padded[1, 2] = -float("inf")
    targets = torch.tensor([0, vocabulary - 1, 7, 7])
    weights = torch.tensor([1.0, 0.25, 0.0, 3.0])
    logits = padded.to(dtype)[:, :vocabulary]
    exact = logits.float().clone().requires_grad_()
    wanted = F.cross_entropy(exact, targets, reduction="none")
    (wanted * weights).sum().backward()
    assert exact.grad is not None
    losses, without = torch.empty(rows), torch.empty(rows)
    cross_entropy._by_kernel(logits.clone(), targets, None, without)
    before = padded.to(dtype)
    slope = cross_entropy._by_kernel(before[:, :vocabulary], targets, weights, losses)
    torch.testing.assert_close(losses, wanted.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(without, losses, rtol=0, atol=0)
    torch.testing.assert_close(slope.float(), exact.grad.to(dtype).float(), rtol=1e-2, atol=1e-4)
    assert torch.equal(before[:, vocabulary:], padded.to(dtype)[:, vocabulary:]), "written beyond the vocabulary"


if __name__ == "__main__":
    {"compile": compile_all, "interpret": interpret_all}[sys.argv[1]]()
