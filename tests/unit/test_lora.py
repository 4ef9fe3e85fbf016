"""A LoRA layer's own arithmetic gives what PEFT's gives, and holds less for the backward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from sftx.errors import ModelError
from sftx.model.adapt import AdaptedModel, lora_layers, read_adapter
from sftx.model.lora.dropout import Clock, KeyedDropout
from sftx.model.lora.layer import LoraLinear, RoutedLora
from sftx.model.lora.layer_4bit import LoraLinear4bit
from sftx.model.lora.routing import Span
from sftx.model.modes import Full, Lora

ROWS, INNER, OUTER = 50, 24, 40


def layer_of(*, ours: bool = True, bias: bool = True, dropout: float = 0.0, four_bits: bool = False) -> nn.Module:
    """Return a LoRA layer whose update is not nothing, sftx's or PEFT's."""
    torch.manual_seed(0)
    linear: nn.Module = nn.Linear(INNER, OUTER, bias=bias)
    if four_bits:
        import bitsandbytes

        quantized = bitsandbytes.nn.Linear4bit(64, 64, bias=bias, compute_dtype=torch.float32, quant_type="nf4")
        quantized.load_state_dict(nn.Linear(64, 64, bias=bias).state_dict())
        linear = quantized.to("cpu")
    model = nn.Sequential(linear).requires_grad_(False)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["0"], lora_dropout=0.0)
    if ours:
        config._register_custom_module({type(linear): LoraLinear4bit if four_bits else LoraLinear})
    get_peft_model(model, config)
    (layer,) = lora_layers(model)
    assert isinstance(layer, RoutedLora) == ours
    nn.init.normal_(layer.lora_B["default"].weight)
    layer.lora_dropout["default"] = KeyedDropout(dropout, Clock(3, step=5), 0)
    return layer


def results(layer: nn.Module, x: torch.Tensor, **autocast: object) -> list[torch.Tensor]:
    """Return output and gradients of a layer."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bool(autocast)):
        out = layer(x)
    out.float().square().sum().backward()
    trained = [p.grad for p in layer.parameters() if p.requires_grad]
    assert len(trained) == 2
    assert all(g is not None for g in trained)
    return [out.detach(), x.grad, *trained]


@pytest.mark.parametrize("case", [{}, {"bias": False}, {"dropout": 0.3}, {"four_bits": True}], ids=str)
def test_same_as_peft(case: dict[str, object]) -> None:
    layer = layer_of(**case)  # type: ignore[arg-type]
    x = torch.randn(2, ROWS, layer.in_features)
    expected = results(layer_of(ours=False, **case), x)  # type: ignore[arg-type]
    for found, wanted in zip(results(layer, x), expected, strict=True):
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)


def test_same_as_peft_in_half_precision() -> None:
    layer = layer_of(dropout=0.2)
    x = torch.randn(ROWS, INNER)
    expected = results(layer_of(ours=False, dropout=0.2), x, half=True)
    for found, wanted in zip(results(layer, x, half=True), expected, strict=True):
        assert found.dtype == wanted.dtype
        assert (found - wanted).abs().max() <= 0.03 * wanted.abs().max()


def test_an_adapter_that_is_off_or_merged_goes_peft_s_way() -> None:
    layer = layer_of()
    x = torch.randn(ROWS, INNER)
    with_it = layer(x)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.enable_adapters(True)
    assert torch.equal(layer(x), with_it)
    layer.merge()
    torch.testing.assert_close(layer(x), with_it, rtol=1e-5, atol=1e-5)


def held(layer: nn.Module, x: torch.Tensor) -> int:
    """Return the bytes that a forward pass holds for the backward pass, besides parameters and its input."""
    known = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), x)}
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if (at := tensor.untyped_storage().data_ptr()) not in known:
            sizes[at] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = layer(x)
    assert out.requires_grad
    return sum(sizes.values())


def test_little_is_held_for_the_backward_pass() -> None:
    layer = layer_of(dropout=0.3)
    x = torch.randn(ROWS, INNER, requires_grad=True)
    of_peft = held(layer_of(ours=False, dropout=0.3), x)
    low_rank, mask = ROWS * 8 * 4, ROWS * INNER
    assert held(layer, x) == low_rank + mask < of_peft / 2


def test_dropout_keeps_the_share_that_it_says_and_scales_by_it() -> None:
    dropout = KeyedDropout(0.05, Clock(1), 2)
    x = torch.ones(1000, 999)
    keep, kept = dropout.keep(x)
    assert kept == pytest.approx(0.95, abs=1e-5)
    assert keep.float().mean().item() == pytest.approx(0.95, abs=1e-3)
    rows, columns = keep.float().mean(1), keep.float().mean(0)
    assert rows.std().item() == pytest.approx(columns.std().item(), rel=0.2) == pytest.approx(0.0069, rel=0.2)
    torch.testing.assert_close(dropout(x).mean(), torch.tensor(1.0), atol=1e-3, rtol=0)
    assert torch.equal(dropout.keep(x)[0], keep)
    dropout.clock.micro_batch = 1
    assert not torch.equal(dropout.keep(x)[0], keep)


def quantized_model() -> nn.Module:
    """Return the embedded model in 4 bits, in evaluation mode, as a run loads it."""
    from sftx.model.loading.load import find_model, load_base
    from sftx.model.modes import QLora

    quantization = QLora(8, 16, 0.0).quantization(torch.float32)
    source = find_model("qwen-tiny")
    return load_base(source, dtype=torch.float32, quantization=quantization, device=torch.device("cpu")).eval()


def test_4_bit_layers_without_an_adapter_evaluate_as_they_train() -> None:
    """On a CPU with AVX-512 BF16 bitsandbytes repacks such weights, lossily, for a kernel that computes in bf16."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    layers = [m for m in quantized_model().modules() if isinstance(m, Linear4bit)]
    assert len(layers) == 4 * 7
    for layer in layers:
        x = torch.randn(3, layer.in_features)
        exact = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        with torch.no_grad():
            found = layer(x)
        torch.testing.assert_close(found, nn.functional.linear(x, exact, layer.bias), rtol=0, atol=1e-5)
        assert torch.equal(dequantize_4bit(layer.weight.data, layer.weight.quant_state), exact)


SHAPE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


def two_adapters(dropout: float = 0.0) -> AdaptedModel:
    """Return a small model with two adapters of different rank whose updates are not nothing."""
    torch.manual_seed(0)
    model = AdaptedModel(
        Qwen2ForCausalLM(Qwen2Config(**SHAPE)).requires_grad_(False),
        trained_dtype=torch.float32,
        gradient_checkpointing=False,
    )
    model.add("a", Lora(rank=4, alpha=8, dropout=dropout), seed=1)
    model.add("b", Lora(rank=2, alpha=8, dropout=dropout, target_modules="attention"), seed=2)
    for name, parameter in model.module.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    assert all(isinstance(layer, RoutedLora) for layer in lora_layers(model.module))
    return model


def of_layers(model: AdaptedModel, x: torch.Tensor) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Return every layer's output for the same tokens, and the gradients of the adapters."""
    model.module.zero_grad()
    outs = [layer(x) for layer in lora_layers(model.module) if layer.in_features == x.shape[-1]]
    assert len(outs) == 2 * 6
    sum(out.square().sum() for out in outs).backward()  # type: ignore[union-attr]
    grads = {n: p.grad.clone() for n, p in model.module.named_parameters() if p.grad is not None}
    return [out.detach() for out in outs], grads


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_routed_tokens_get_what_their_adapter_alone_gives(dropout: float) -> None:
    model = two_adapters(dropout)
    x = torch.randn(20, 32)
    of_a, of_b, of_base = slice(0, 7), slice(7, 16), slice(16, 20)
    with model.using("a"):
        outs_a, grads_a = of_layers(model, x[of_a])
    with model.using("b"):
        outs_b, grads_b = of_layers(model, x[of_b])
    grads_a = {n: g for n, g in grads_a.items() if ".a." in n}
    grads_b = {n: g for n, g in grads_b.items() if ".b." in n}
    with model.without_adapters(), torch.no_grad():
        outs_base = [layer(x[of_base]) for layer in lora_layers(model.module) if layer.in_features == 32]
    with model.routed([Span(7, 16, "b"), Span(0, 7, "a")]):
        outs, grads = of_layers(model, x)
    for out, alone_a, alone_b, base in zip(outs, outs_a, outs_b, outs_base, strict=True):
        torch.testing.assert_close(out, torch.cat([alone_a, alone_b, base]), rtol=1e-5, atol=1e-5)
    assert set(grads) == set(grads_a) | set(grads_b)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, (grads_a | grads_b)[name], rtol=1e-4, atol=1e-5)


def test_one_adapter_may_have_several_spans() -> None:
    model, x = two_adapters(), torch.randn(20, 32)
    with model.using("a"):
        outs, grads = of_layers(model, x)
    with model.routed([Span(0, 8, "a"), Span(8, 20, "a")]):
        again, grads_again = of_layers(model, x)
    for one, other in zip(outs, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    for name, grad in grads_again.items():
        torch.testing.assert_close(grad, grads[name], rtol=1e-4, atol=1e-4)


def test_spans_that_overlap_are_refused() -> None:
    model = two_adapters()
    with pytest.raises(ValueError, match="overlap"), model.routed([Span(0, 8, "a"), Span(7, 9, "b")]):
        pass


def test_without_adapters_is_the_base_and_leaves_them_trainable() -> None:
    model = two_adapters()
    ids = torch.tensor([[1, 2, 3, 4]])
    torch.manual_seed(0)
    base = Qwen2ForCausalLM(Qwen2Config(**SHAPE))
    with torch.no_grad():
        wanted, adapted = base(ids).logits, model(input_ids=ids).logits
        with model.without_adapters():
            torch.testing.assert_close(model(input_ids=ids).logits, wanted)
        assert torch.equal(model(input_ids=ids).logits, adapted)
    assert (adapted - wanted).abs().max() > 1e-3
    assert all(p.requires_grad for a in model.adapters.values() for p in a.parameters.values())


def test_full_mode_has_no_model_without_adapters() -> None:
    model = AdaptedModel(
        Qwen2ForCausalLM(Qwen2Config(**SHAPE)), trained_dtype=torch.float32, gradient_checkpointing=False
    )
    model.add("default", Full(), seed=1)
    with pytest.raises(ModelError, match="mode=full"), model.without_adapters():
        pass


def test_files_are_peft_s_both_ways(tmp_path: Path) -> None:
    """What sftx saves loads in plain PEFT with the same logits, and what PEFT saves loads in sftx."""
    from peft import PeftModel

    model, ids = two_adapters(), torch.tensor([[1, 2, 3, 4]])
    with model.using("a"):
        model.module.save_pretrained(tmp_path / "ours", selected_adapters=["a"])
        wanted = model(input_ids=ids).logits
    torch.manual_seed(0)
    plain = PeftModel.from_pretrained(Qwen2ForCausalLM(Qwen2Config(**SHAPE)), tmp_path / "ours" / "a")
    assert not any(isinstance(layer, RoutedLora) for layer in lora_layers(plain))
    torch.testing.assert_close(plain(input_ids=ids).logits, wanted)

    plain.save_pretrained(tmp_path / "peft")
    torch.manual_seed(0)
    base = Qwen2ForCausalLM(Qwen2Config(**SHAPE)).requires_grad_(False)
    back = AdaptedModel(base, trained_dtype=torch.float32, gradient_checkpointing=False)
    adapter = back.add("default", Lora(rank=4, alpha=8, dropout=0.0), seed=5, start=tmp_path / "peft")
    assert set(read_adapter(tmp_path / "peft", adapter)) == set(adapter.parameters)
    assert all(isinstance(layer, RoutedLora) for layer in lora_layers(back.module))
    torch.testing.assert_close(back(input_ids=ids).logits, wanted)
    torch.testing.assert_close(back.module.merge_and_unload()(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-5)
