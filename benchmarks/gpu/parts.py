"""The parts of a step on a GPU, each in the ways that it can be done: milliseconds of forward and backward pass.

    python benchmarks/gpu/parts.py [--shapes 0.5b,7b] [--tokens 4096] [--length 2048]
    python benchmarks/gpu/parts.py --shapes toy --tokens 64 --length 32      # the same on a CPU, in seconds

Shapes of Qwen2.5, bf16 under autocast (on a CPU fp32), LoRA: the base and the head are frozen. Prints a JSON line a
part: for each way the median of ten passes, or why it could not be taken. What sftx picks follows from these.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))
from bench import RANK, SHAPES

Way = Callable[[], Any]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


def main() -> int:
    """Time what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="0.5b,7b")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--length", type=int, default=2048)
    asked = parser.parse_args()
    for name in asked.shapes.split(","):
        shape = SHAPES[name]
        for part in (norm, swiglu, rotation, head, attention, linear, four_bits):
            ways = part(shape, asked)
            line = {"benchmark": "gpu parts", "shape": name, "part": part.__name__, "tokens": asked.tokens}
            print(json.dumps(line | {way: _timed(make) for way, make in ways.items()}), flush=True)
    return 0


def _timed(make: Callable[[], Way]) -> float | str:
    """Return the median milliseconds of what `make` returns, or why there are none."""
    try:
        run = make()
        for _ in range(3):
            run()
        times = []
        for _ in range(10):
            if DEVICE.type == "cuda":
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                run()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end))
            else:
                began = time.perf_counter()
                run()
                times.append(1e3 * (time.perf_counter() - began))
        return round(statistics.median(times), 4)
    except Exception as error:  # noqa: BLE001 - what is not installed or not supported here is said
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


def _random(*shape: int, grad: bool = False) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE).requires_grad_(grad)


def _autocast(enabled: bool = True) -> AbstractContextManager[object]:
    """Return the context of a step's forward pass."""
    return torch.autocast("cuda", DTYPE, enabled) if DEVICE.type == "cuda" else nullcontext()


def _as_in_a_step(function: Callable[..., Any]) -> Callable[..., Any]:
    def within(*leaves: torch.Tensor) -> Any:
        with _autocast():
            return function(*leaves)

    return within


def _passes(function: Callable[..., Any], *leaves: torch.Tensor) -> Way:
    """Return a forward and a backward pass of a function of leaves; those without a gradient need none."""
    function = _as_in_a_step(function)
    outs = function(*leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    grads = [torch.randn_like(o) for o in outs]
    wanted = [t for t in leaves if t.requires_grad]

    def run() -> None:
        found = function(*leaves)
        torch.autograd.grad(found if isinstance(found, tuple) else (found,), wanted, grads)

    return run


def norm(shape: dict[str, Any], asked: Any) -> dict[str, Callable[[], Way]]:
    """Time RMSNorm, the weight frozen."""
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    width = shape["hidden_size"]
    x, weight = _random(1, asked.tokens, width, grad=True), _random(width)
    module = Qwen2RMSNorm(width).to(DEVICE, DTYPE).requires_grad_(False)

    def liger() -> Way:
        from liger_kernel.ops import LigerRMSNormFunction

        return _passes(lambda x: LigerRMSNormFunction.apply(x, weight, 1e-6, 0.0, "llama", False), x)

    def torchs(autocast: bool) -> Way:
        def kernel(x: torch.Tensor) -> torch.Tensor:
            with _autocast(autocast):
                return F.rms_norm(x, (width,), weight, 1e-6)

        return _passes(kernel, x)

    return {
        "transformers": lambda: _passes(module, x),
        "torch, in fp32 by autocast": lambda: torchs(True),
        "torch, outside autocast": lambda: torchs(False),
        "liger": liger,
    }


def swiglu(shape: dict[str, Any], asked: Any) -> dict[str, Callable[[], Way]]:
    """Time `silu(gate) * up`."""
    gate, up = (_random(1, asked.tokens, shape["intermediate_size"], grad=True) for _ in range(2))

    def liger() -> Way:
        from liger_kernel.ops import LigerSiLUMulFunction

        return _passes(LigerSiLUMulFunction.apply, gate, up)

    return {"torch": lambda: _passes(lambda g, u: F.silu(g) * u, gate, up), "liger": liger}


def rotation(shape: dict[str, Any], asked: Any) -> dict[str, Callable[[], Way]]:
    """Time the rotation of queries and keys."""
    from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

    heads, keys = shape["num_attention_heads"], shape["num_key_value_heads"]
    width = shape["hidden_size"] // heads
    q, k = (_random(1, asked.tokens, n * width, grad=True) for n in (heads, keys))
    cos, sin = _random(1, asked.tokens, width), _random(1, asked.tokens, width)

    def ways(rotate: Callable[..., Any]) -> Way:
        def split(x: torch.Tensor) -> torch.Tensor:
            return (x * 1).view(1, asked.tokens, -1, width).transpose(1, 2)  # it may be rotated in place

        return _passes(lambda q, k: tuple(rotate(split(q), split(k), cos, sin)), q, k)

    def liger() -> Way:
        from liger_kernel.transformers.rope import liger_rotary_pos_emb

        return ways(liger_rotary_pos_emb)

    return {
        "transformers": lambda: ways(apply_rotary_pos_emb),
        "liger": liger,
    }


def head(shape: dict[str, Any], asked: Any) -> dict[str, Callable[[], Way]]:
    """Time head and loss, the head frozen."""
    from sftx.model.head import LossHead
    from sftx.model.kernels.cross_entropy import kernel_unusable

    hidden = _random(asked.tokens, shape["hidden_size"], grad=True)
    weight = (0.02 * torch.randn(shape["vocab_size"], shape["hidden_size"], device=DEVICE)).to(DTYPE)
    targets = torch.randint(shape["vocab_size"], (asked.tokens,), device=DEVICE)
    weights = torch.ones(asked.tokens, device=DEVICE)

    def own(kernel: bool) -> Way:
        if kernel and (reason := kernel_unusable(DEVICE, DTYPE)):
            raise RuntimeError(reason)
        layer = torch.nn.Linear(*weight.shape[::-1], bias=False, device="meta")
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        loss_head = LossHead(layer)
        loss_head.triton = kernel

        def run() -> None:
            total, _ = loss_head(hidden, targets, weights)
            torch.autograd.grad(total, hidden)

        return run

    def plain() -> Way:
        def run() -> None:
            loss = F.cross_entropy((hidden @ weight.t()).float(), targets, reduction="sum")
            torch.autograd.grad(loss, hidden)

        return run

    def liger() -> Way:
        from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction as Fused

        def run() -> None:
            loss = Fused.apply(hidden, weight, targets, None, None, -100, 0.0, 0.0, "sum")
            torch.autograd.grad(loss[0] if isinstance(loss, tuple) else loss, hidden)

        return run

    def products() -> Way:
        def run() -> None:
            logits = hidden.detach() @ weight.t()
            logits @ weight

        return run

    return {
        "all logits": plain,
        "sftx by torch": lambda: own(False),
        "sftx by its kernel": lambda: own(True),
        "liger": liger,
        "the two products alone": products,
    }


def attention(shape: dict[str, Any], asked: Any) -> dict[str, Callable[[], Way]]:
    """Time causal attention within documents of `length`, and of a quarter of it."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from sftx.model.kernels.attention import _one_by_one, varlen

    heads, keys = shape["num_attention_heads"], shape["num_key_value_heads"]
    width = shape["hidden_size"] // heads
    q, k, v = (_random(asked.tokens, n, width, grad=True) for n in (heads, keys, keys))
    found: dict[str, Callable[[], Way]] = {}
    for length in (asked.length, asked.length // 4):
        lengths = (length,) * (asked.tokens // length)

        def by(kernel: Callable[..., Any], lengths: tuple[int, ...] = lengths) -> Way:
            return _passes(lambda q, k, v: kernel(q, k, v, lengths, None, None), q, k, v)

        def only(backend: Any, lengths: tuple[int, ...] = lengths) -> Way:
            def kernel(*arguments: Any) -> torch.Tensor:
                with sdpa_kernel(backend):
                    return _one_by_one(*arguments)

            return by(kernel, lengths)

        found[f"{length}: varlen"] = lambda by=by: by(varlen)
        found[f"{length}: sdpa"] = lambda by=by: by(_one_by_one)
        found[f"{length}: sdpa, cuDNN"] = lambda only=only: only(SDPBackend.CUDNN_ATTENTION)
        found[f"{length}: sdpa, flash"] = lambda only=only: only(SDPBackend.FLASH_ATTENTION)
    return found


def linear(shape: dict[str, Any], asked: Any) -> dict[str, Callable[[], Way]]:
    """Time a LoRA layer, the MLP's first."""
    from sftx.model.lora.function import Update, lora_linear

    inner, outer = shape["hidden_size"], shape["intermediate_size"]
    base = torch.nn.Linear(inner, outer, bias=False).to(DEVICE, DTYPE).requires_grad_(False)
    x = _random(asked.tokens, inner, grad=True)
    A, B = (torch.randn(*s, device=DEVICE).requires_grad_() for s in ((RANK, inner), (outer, RANK)))

    def peft(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        return base(x) + F.linear(F.linear(x, A.to(DTYPE)), B.to(DTYPE)) * 2.0

    return {
        "frozen, without LoRA": lambda: _passes(base, x),
        "PEFT's way": lambda: _passes(peft, x, A, B),
        "sftx": lambda: _passes(
            lambda x, A, B: lora_linear(x, base, [Update(0, len(x), 2.0, None, A, B)], DTYPE), x, A, B
        ),
    }


def four_bits(shape: dict[str, Any], asked: Any) -> dict[str, Callable[[], Way]]:
    """Time a LoRA layer on a base in NF4, and unfolding its weight."""
    from sftx.model.lora.function import Update, lora_linear, weight_of

    inner, outer = shape["hidden_size"], shape["intermediate_size"]
    x = _random(asked.tokens, inner, grad=True)
    A, B = (torch.randn(*s, device=DEVICE).requires_grad_() for s in ((RANK, inner), (outer, RANK)))

    def base() -> Any:
        import bitsandbytes as bnb

        layer = bnb.nn.Linear4bit(inner, outer, bias=False, compute_dtype=DTYPE, quant_type="nf4")
        return layer.to(DTYPE).to(DEVICE)  # quantized on its way there: unfolded, it has the dtype that it had before

    def peft() -> Way:
        layer = base()
        return _passes(lambda x, A, B: layer(x) + F.linear(F.linear(x, A.to(DTYPE)), B.to(DTYPE)) * 2.0, x, A, B)

    def own() -> Way:
        layer = base()
        return _passes(lambda x, A, B: lora_linear(x, layer, [Update(0, len(x), 2.0, None, A, B)], DTYPE), x, A, B)

    def unfold() -> Way:
        layer = base()
        return lambda: weight_of(layer, DTYPE)

    return {"PEFT's way": peft, "sftx": own, "unfolding alone": unfold}


if __name__ == "__main__":
    sys.exit(main())
