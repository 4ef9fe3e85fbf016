"""An optimizer step of a model of Qwen2.5-7B's shape on an imitated GPU; prints what was seen as a JSON line a case.

python -m tests.fake_gpu.simulate '{"mode": "qlora"}' ...       # each a JSON object of Case's fields
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.fake_gpu.device import FakeGpu, load

SHAPE = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4,
    "vocab_size": 152064, "max_position_embeddings": 32768, "tie_word_embeddings": False,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What is trained, and on what; the defaults are those of the manual."""

    mode: str
    layers: int = 28
    dtype: str = "float16"
    lengths: tuple[int, ...] = (1024,)
    rank: int = 64
    dropout: float = 0.05
    checkpointing: bool = True
    model: str = "qwen2"


def build_guard(folder: Path) -> Path:
    """Compile guard.cpp with g++; return the library."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    torch_folder, library = Path(spec.origin).parent, folder / "guard.so"
    include = [f"-I{torch_folder / part}" for part in ("include", "include/torch/csrc/api/include")]
    link = [f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu"]
    source = str(Path(__file__).with_name("guard.cpp"))
    command = ["g++", "-O0", "-std=c++20", "-shared", "-fPIC", *include, source, "-o", str(library), *link]
    subprocess.run(command, check=True)
    return library


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        load(str(build_guard(Path(folder))))
    for words in sys.argv[1:]:
        case = Case(**json.loads(words))
        print(json.dumps({"case": asdict(case), "seen": simulate(case)}), flush=True)


def simulate(case: Case) -> dict[str, Any]:
    """Load the model, let sftx probe it, and make two steps of a micro-batch each; the second is counted."""
    import torch

    from sftx.effective import Effective
    from sftx.parallel.stepper import Stepper
    from sftx.training.loss import token_losses
    from sftx.training.optimizers import AdamW
    from sftx.training.precision import Precision

    gpu = FakeGpu()
    dtype = getattr(torch, case.dtype)
    with gpu.running():
        model, adapter = _model(case, gpu)
        loaded = gpu.bytes
        precision = Precision(case.dtype, tf32=False)  # type: ignore[arg-type]
        numerics = precision.resolve(gpu.device, Effective(), sharded=False)
        probed = _probe(model, numerics, gpu)
        model.module.train()
        optimizer = AdamW(32, False, (0.9, 0.999), 1e-8, 0.0).build(adapter.parameters, 1e-4, Effective())
        stepper = Stepper(adapter.parameters, optimizer, dtype, 0.3)
        watched = _watch(model)
        batch = _batch(case.lengths)

        def micro_batch() -> torch.Tensor:
            with numerics.autocast():
                loss = token_losses(model, batch, gpu.device).weighted_sum
            stepper.backward(loss / 100, last=True)
            return loss.detach()

        stepper.step(1e-4, apply=torch.isfinite(micro_batch()))  # makes the optimizer's state
        gpu.start_counting()
        loss = micro_batch()
        calls, reads = gpu.calls.copy(), list(gpu.reads)
        gradients = {str(p.grad.dtype) if p.grad is not None else "none" for p in adapter.parameters.values()}
        stepper.step(1e-4, apply=torch.isfinite(loss))
        return {
            "probed": probed,
            "inputs": {name: sorted(found) for name, found in watched.items()},
            "gradients": sorted(gradients),
            "reads": reads,
            "reads_of_step": gpu.reads[len(reads) :],
            "calls": calls.total(),
            "calls_of_step": gpu.calls.total() - calls.total(),
            "by_name": dict(calls.most_common(12)),
            "loaded": loaded,
            "between": gpu.bytes,
            "peak": gpu.peak,
        }


def _model(case: Case, gpu: FakeGpu) -> tuple[Any, Any]:
    """Return a model as sftx makes it, with random weights, and its adapter."""
    import torch
    from torch.utils._python_dispatch import _disable_current_modes
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    from sftx.model.adapt import AdaptedModel
    from sftx.model.kernels.attention import register
    from sftx.model.modes import Full, Lora, QLora

    kinds: dict[str, tuple[Any, Any]] = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }
    make_config, kind = kinds[case.model]
    config = make_config(num_hidden_layers=case.layers, **SHAPE)
    mode = {"lora": Lora, "qlora": QLora}[case.mode](case.rank, 16, case.dropout) if case.mode != "full" else Full()
    with _disable_current_modes(), torch.device("meta"):
        base = kind._from_config(
            config, dtype=mode.weights_dtype(getattr(torch, case.dtype)), attn_implementation=register("sdpa")
        )
    base.to_empty(device=gpu.device)
    if case.mode == "qlora":
        _quantize(base, getattr(torch, case.dtype))
    base.config.use_cache = False
    if mode.adapts:
        base.requires_grad_(False)
    model = AdaptedModel(base, trained_dtype=torch.float32, gradient_checkpointing=case.checkpointing)
    return model, model.add("default", mode, 42)


def _quantize(base: Any, dtype: Any) -> None:
    """Replace the linear layers of the blocks by those in 4 bits, as transformers does while it loads."""
    import bitsandbytes as bnb
    import torch
    from torch.utils._python_dispatch import _disable_current_modes
    from transformers import BitsAndBytesConfig

    for parent in list(base.model.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is not torch.nn.Linear:
                continue
            with _disable_current_modes():
                layer = bnb.nn.Linear4bit(
                    linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=dtype, device="meta"
                )
            packed, state = bnb.functional.quantize_4bit(
                linear.weight.data, quant_type="nf4", compress_statistics=True, blocksize=64
            )
            weight: Any = torch.nn.Parameter(packed, requires_grad=False)
            weight.quant_state, weight.quant_type, weight.compress_statistics = state, "nf4", True
            layer.weight, layer.bias = weight, linear.bias
            setattr(parent, name, layer)
    base.is_loaded_in_4bit = True
    base.config.quantization_config = BitsAndBytesConfig(load_in_4bit=True)


def _probe(model: Any, numerics: Any, gpu: FakeGpu) -> dict[str, Any]:
    """Let sftx find out what the model can do without; return what it found."""
    from sftx.model.kernels.attention import VARLEN
    from sftx.model.probe import probe

    found = probe(
        model, numerics, gpu.device, padding_free=True, kernels=[VARLEN], pinned=None, from_main=lambda value: value
    )
    return {"varlen": found.unusable.get(VARLEN), "documents": found.documents_leak, "head": model.computes_losses}


def _watch(model: Any) -> dict[str, set[str]]:
    """Return the dtypes that reach LoRA layers and attention, which are filled in while the model runs."""
    from transformers import AttentionInterface

    from sftx.model.adapt import lora_layers
    from sftx.model.lora.targets import decoder_layers

    seen: dict[str, set[str]] = {"linear": set(), "attention": set()}
    layers = lora_layers(model.module) or [
        m for block in decoder_layers(model.module) for n, m in block.named_modules() if n.endswith("_proj")
    ]
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, inputs: seen["linear"].add(str(inputs[0].dtype)))
    name = model.module.config._attn_implementation
    attend: Callable[..., Any] = AttentionInterface()[name]

    def watching(module: Any, *tensors: Any, **kwargs: Any) -> Any:
        seen["attention"] |= {str(t.dtype) for t in tensors[:3]}
        return attend(module, *tensors, **kwargs)

    AttentionInterface.register(name, watching)
    return seen


def _batch(lengths: tuple[int, ...]) -> Any:
    """Return packed rows; the last 60 % of each are supervised."""
    import torch

    from sftx.data.batches.collate import IGNORE, Batch

    total = sum(lengths)
    targets, weights = torch.full((1, total), IGNORE), torch.zeros(1, total)
    start = 0
    for length in lengths:
        supervised = slice(start + length * 2 // 5, start + length - 1)
        targets[0, supervised], weights[0, supervised] = 5, 1.0
        start += length
    rows = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    origins = tuple(f"row {i}" for i in range(len(lengths)))
    return Batch(torch.ones(1, total, dtype=torch.long), targets, weights, rows, origins, 0, total, lengths, positions)


if __name__ == "__main__":
    main()
