"""Trained weights are read back as they were saved, whatever names and layout transformers saves them in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    FalconH1Config,
    Gemma2Config,
    Glm4MoeConfig,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from sftx.errors import ModelError
from sftx.model.adapt import AdaptedModel, Adapter
from sftx.model.export.weights import read_weights, weights_writer
from sftx.model.modes import Full, Lora

SIZES = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
"""The experts are as wide as the model: tensors that are transposed or swapped keep their shapes."""
ARCHITECTURES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "qwen2, tied": (Qwen2Config, {"tie_word_embeddings": True}),
    "phi3": (Phi3Config, {}),
    "gemma2": (Gemma2Config, {}),
    "gpt_neox": (GPTNeoXConfig, {}),
    "mixtral": (MixtralConfig, {"num_local_experts": 4}),
    "qwen2_moe": (Qwen2MoeConfig, MIXTURE | {"num_experts": 4, "shared_expert_intermediate_size": 8}),
    "qwen3_moe": (Qwen3MoeConfig, MIXTURE | {"num_experts": 4}),
    "qwen3_moe, tied": (Qwen3MoeConfig, MIXTURE | {"num_experts": 4, "tie_word_embeddings": True}),
    "glm4_moe": (Glm4MoeConfig, MIXTURE | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}),
    "qwen3_next": (
        Qwen3NextConfig,
        MIXTURE
        | {"num_hidden_layers": 4, "num_experts": 4, "shared_expert_intermediate_size": 8, "linear_num_key_heads": 2}
        | {"linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    ),
    "deepseek_v3": (
        DeepseekV3Config,
        MIXTURE
        | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
        | {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
    ),
    "gpt_oss": (GptOssConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "falcon_h1": (
        FalconH1Config,
        {"mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1}
        | {"mamba_expand": 1},
    ),
}


def loaded(config: Any, folder: Path) -> AdaptedModel:
    """Return a model as a run has it: read from a folder."""
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return whole(folder)


def whole(folder: Path) -> AdaptedModel:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return AdaptedModel(base, trained_dtype=torch.float32, gradient_checkpointing=False)


def trained(adapter: Adapter) -> dict[str, torch.Tensor]:
    """Return weights of which no two are equal."""
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(p.shape, generator=generator) for n, p in adapter.parameters.items()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_full_weights_are_read_back_exactly(name: str, tmp_path: Path) -> None:
    kind, values = ARCHITECTURES[name]
    model = loaded(kind(**SIZES | values), tmp_path / "base")
    adapter = model.add("default", Full(), seed=1)
    weights = trained(adapter)
    (tmp_path / "saved").mkdir()
    weights_writer(model, adapter, weights, tmp_path / "base")(tmp_path / "saved")
    found = read_weights(model, adapter, tmp_path / "saved")
    assert found.keys() == weights.keys()
    assert not [n for n in weights if not torch.equal(found[n], weights[n])]
    plain = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).named_parameters())
    assert not [n for n in weights if not torch.equal(plain[n], weights[n])]


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    kind, values = ARCHITECTURES["qwen3_moe"]
    model = loaded(kind(**SIZES | values), tmp_path / "base")
    adapter = model.add("default", Full(), seed=1)
    loaded(kind(**SIZES | values | {"num_experts": 8}), tmp_path / "more experts")
    loaded(LlamaConfig(**SIZES), tmp_path / "other")
    lora = whole(tmp_path / "other").add("default", Lora(rank=2, alpha=4, dropout=0.0), seed=1)
    (tmp_path / "adapter").mkdir()
    lora.config.save_pretrained(tmp_path / "adapter")
    for folder in ("more experts", "other", "adapter"):
        with pytest.raises(ModelError, match=r"its weights (do not fit this model|cannot be read)") as caught:
            read_weights(model, adapter, tmp_path / folder)
        assert "\n" not in str(caught.value)
