"""Which parameters an adapter has, and how they are counted."""

from __future__ import annotations

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from sftx.model.adapt import AdaptedModel, Full, Lora

LORA = Lora(rank=2, alpha=4, dropout=0.0)
MODULES, FACTORS = 7, 2
"""Linear layers of a Qwen2 block, matrices of a LoRA layer."""


def tiny(layers: int = 3) -> AdaptedModel:
    config = Qwen2Config(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    return AdaptedModel(Qwen2ForCausalLM(config), trained_dtype=torch.float32, gradient_checkpointing=False)


def test_adapters_named_like_layers_have_their_own_parameters_only() -> None:
    model = tiny()
    adapters = [model.add(name, LORA, seed=1) for name in ("0", "1", "trial_1", "trial_10", "layers")]
    for adapter in adapters:
        assert len(adapter.parameters) == 3 * MODULES * FACTORS, adapter.name
        assert all(name.split(".")[-2] == adapter.name for name in adapter.parameters)


def test_base_and_trained_parameters_are_counted_apart_for_each_adapter() -> None:
    model = tiny()
    base = sum(p.numel() for p in model.module.parameters())
    first = model.add("trial_0", LORA, seed=1)
    second = model.add("trial_1", Lora(rank=4, alpha=4, dropout=0.0), seed=1)
    trained = sum(p.numel() for p in first.parameters.values())
    assert model.facts(first) == {"parameters": base, "trained_parameters": trained}
    assert model.facts(second) == {"parameters": base, "trained_parameters": 2 * trained}


def test_in_full_mode_all_parameters_are_trained() -> None:
    model = tiny()
    base = sum(p.numel() for p in model.module.parameters())
    assert model.facts(model.add("default", Full(), seed=1)) == {"parameters": base, "trained_parameters": base}
