"""Runs on small models of architectures that need something of their own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    FalconH1Config,
    Gemma2Config,
    Glm4MoeConfig,
    GPT2Config,
    Llama4Config,
    Llama4ForConditionalGeneration,
    Mamba2Config,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from sftx.errors import ModelError
from sftx.model.loading.builtin import ensure_builtin
from sftx.run import run


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that makes a small model with the embedded model's tokenizer."""

    def make(config_class: Any, name: str = "model", **values: Any) -> Path:
        tokenizer = AutoTokenizer.from_pretrained(ensure_builtin())
        sizes = {
            "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }  # fmt: skip
        torch.manual_seed(0)
        folder = tmp_path / name
        AutoModelForCausalLM.from_config(config_class(**sizes | values)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


def manifest_of(config: Any) -> dict[str, Any]:
    return json.loads((Path(config.output_dir) / "manifest.json").read_text(encoding="utf-8"))


def test_an_architecture_without_sdpa_is_trained_with_eager_attention_and_it_is_said(
    make_config, make_model, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(f"model_name_or_path={make_model(Gemma2Config)}", "max_steps=1")
    run([config])
    effective = manifest_of(config)["effective"]
    assert effective["settings"]["attn_implementation"] == "eager"
    assert [f["effective"] for f in effective["fallbacks"] if f["key"] == "attn_implementation"] == ["eager"]
    said = " ".join(capsys.readouterr().out.split())
    assert "attn_implementation=auto -> eager: Gemma2ForCausalLM has no SDPA attention" in said


def test_qlora_on_a_mixture_states_the_share_in_4_bits_and_what_is_not_adapted(
    make_config, make_model, captured, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_model(
        Qwen2MoeConfig, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    )  # fmt: skip
    config = make_config(f"model_name_or_path={folder}", "mode=qlora", "max_steps=1")
    run([config])
    facts = manifest_of(config)["model"]
    attention, shared_expert = sum(n * 16 * 64 for n in (4, 2, 2, 4)), 3 * 32 * 64
    assert facts["share_in_4_bits"] == pytest.approx(2 * (attention + shared_expert) / facts["parameters"])
    assert facts["adapted_layers"] == dict.fromkeys(
        ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"), 2
    )
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"{facts['share_in_4_bits']:.0%} in 4 bits" in said
    assert "not adapted: the experts (" in said


def test_a_full_run_of_a_mixture_is_resumed_bitwise_and_its_best_state_is_published(make_config, make_model) -> None:
    folder = make_model(Qwen3MoeConfig, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
    typed = [
        f"model_name_or_path={folder}", "mode=full", "save_strategy=steps", "save_steps=1", "eval_steps=1",
        "keep_best=true", "lr_scheduler_type=constant",
    ]  # fmt: skip
    straight, resumed = (make_config(*typed, "max_steps=2", output=o) for o in ("straight", "resumed"))
    run([straight])
    run([make_config(*typed, "max_steps=1", output="resumed")])
    run([resumed])
    for name in ("checkpoints/step-000002/model.safetensors", "final/model.safetensors"):
        found, wanted = (Path(c.output_dir, name).read_bytes() for c in (resumed, straight))
        assert found == wanted, name
    assert "resumed from" in Path(resumed.output_dir, "train.log").read_text(encoding="utf-8")


def test_a_token_id_without_an_embedding_is_refused_with_its_row(make_config, make_model) -> None:
    size = len(AutoTokenizer.from_pretrained(ensure_builtin()))
    folder = make_model(Qwen2Config, vocab_size=size - 8, pad_token_id=None, eos_token_id=None)
    with pytest.raises(ModelError, match=r":2: token id \d+ \('<\|im_\w+\|>'\) has no embedding: .* has \d+\."):
        run([make_config(f"model_name_or_path={folder}")])
    with pytest.raises(ModelError, match=r"^the tokenizer of .*: token id \d+ .* has no embedding"):
        run([make_config(f"model_name_or_path={folder}", "data.streaming=true", "eval_ratio=0", "max_steps=1")])


@pytest.mark.parametrize("config_class", [GPT2Config, OPTConfig])
def test_a_row_beyond_the_models_learned_positions_is_refused(make_config, make_model, config_class: Any) -> None:
    sizes = {"max_position_embeddings": 64, "head_dim": 16, "ffn_dim": 64, "word_embed_proj_dim": 64}
    folder = make_model(config_class, **sizes)
    named = f"model_name_or_path={folder}"
    mode = "mode=full" if config_class is GPT2Config else "mode=lora"  # GPT-2's layers are no nn.Linear
    with pytest.raises(ModelError, match=r":\d+: this row has \d+ tokens, and .* 64 only\. Set max_seq_length=64\."):
        run([make_config(named)])
    with pytest.raises(ModelError, match=r"^max_seq_length=96: .* learned positions for 64 tokens only"):
        run([make_config(named, "data.streaming=true", "eval_ratio=0", "max_steps=1")])
    sampled = "callback=generate_samples", "callback.generate_samples.max_new_tokens=64"
    assert run([make_config(named, mode, "max_seq_length=64", "max_steps=1", *sampled)])[0].steps == 1


MAMBA = {
    Mamba2Config: {"state_size": 8, "num_heads": 8, "n_groups": 2, "expand": 2},
    FalconH1Config: {
        "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1,
        "mamba_expand": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("config_class", MAMBA)
def test_mamba_layers_are_trained_with_lora(make_config, make_model, config_class: Any) -> None:
    config = make_config(f"model_name_or_path={make_model(config_class, **MAMBA[config_class])}", "max_steps=1")
    assert run([config])[0].steps == 1
    assert any("out_proj of Mamba layers" in r for r in manifest_of(config)["effective"]["remarks"])


def test_full_mode_refuses_weights_that_are_stored_quantized(make_config, make_model) -> None:
    folder = make_model(Qwen2Config)
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stored["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(stored), encoding="utf-8")
    with pytest.raises(ModelError, match=r"^mode=full: the weights of .* are stored quantized \(bitsandbytes; "):
        run([make_config(f"model_name_or_path={folder}", "mode=full")])


def test_where_peft_has_no_dropout_it_is_stated(make_config, make_model) -> None:
    folder = make_model(
        Glm4MoeConfig, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, n_shared_experts=1,
        first_k_dense_replace=1,
    )  # fmt: skip
    named = f"model_name_or_path={folder}"
    found = []
    for dropout in (0.1, 0):
        config = make_config(named, "max_steps=1", f"lora_dropout={dropout}", output=f"dropout-{dropout}")
        run([config])
        fallbacks = manifest_of(config)["effective"]["fallbacks"]
        found.append([f["effective"] for f in fallbacks if f["key"] == "lora_dropout"])
    (said,), nothing = found
    assert said.startswith("0 in ")
    assert "down_proj.weight" in said
    assert not nothing


def test_what_a_saved_adapter_does_not_adapt_is_stated(make_config, make_model, tmp_path: Path) -> None:
    folder, start = make_model(Qwen2Config), tmp_path / "adapter"
    base = AutoModelForCausalLM.from_pretrained(folder)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    get_peft_model(base, lora).save_pretrained(start)
    config = make_config(f"model_name_or_path={folder}", f"adapter={start}", "lora_alpha=16", "max_steps=1")
    run([config])
    (said,) = (r for r in manifest_of(config)["effective"]["remarks"] if r.startswith("not adapted: "))
    assert said.startswith("not adapted: down_proj, gate_proj, k_proj, o_proj, up_proj (")


def remarks_of(config: Any, word: str) -> list[str]:
    return [r for r in manifest_of(config)["effective"]["remarks"] if word in r]


def test_rows_longer_than_the_model_was_trained_on_are_stated(make_config, make_model) -> None:
    folder = make_model(Qwen2Config, max_position_embeddings=64)
    found = []
    for length in (96, 64):
        config = make_config(
            f"model_name_or_path={folder}", f"max_seq_length={length}", "max_steps=1", output=f"{length}"
        )
        run([config])
        found.append(remarks_of(config, "max_position_embeddings"))
    (said,), nothing = found
    assert re.fullmatch(
        r"max_seq_length=96 is above the model's max_position_embeddings=64: [1-9]\d* of 31 rows are longer\.", said
    )
    assert not nothing


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_what_depends_on_the_batch_is_stated_where_rope_does(make_config, make_model, kind: str) -> None:
    if kind == "longrope":
        scaling = {"type": kind, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
        limits = {"original_max_position_embeddings": 64, "max_position_embeddings": 512, "rope_scaling": scaling}
        folder = make_model(Phi3Config, **limits)
    else:
        rope = {"rope_type": kind, "factor": 4.0, "rope_theta": 10000.0}
        folder = make_model(Qwen2Config, max_position_embeddings=64, rope_parameters=rope)
    config = make_config(f"model_name_or_path={folder}", "max_steps=1", output="long")
    run([config])
    (said,) = remarks_of(config, "RoPE")
    assert said.startswith(f"RoPE {kind}: a batch with a row beyond 64 tokens is rotated as a whole ")
    assert re.search(r"\([1-9]\d* of 31 rows are longer\)", said)
    short = make_config(f"model_name_or_path={folder}", "max_seq_length=64", "max_steps=1", output="short")
    run([short])
    assert not remarks_of(short, "RoPE"), "no row reaches the length from which it depends on the batch"


def test_a_vision_tower_that_a_full_final_leaves_out_is_stated(make_config, make_model, tmp_path: Path) -> None:
    text = make_model(Qwen2Config, "text")  # its tokenizer
    size = len(AutoTokenizer.from_pretrained(text))
    vision = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
    }  # fmt: skip
    language = {
        "vocab_size": size, "hidden_size": 64, "intermediate_size": 64, "intermediate_size_mlp": 64, "head_dim": 16,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2,
        "num_experts_per_tok": 1, "interleave_moe_layer_step": 2,
    }  # fmt: skip
    folder = tmp_path / "both"
    Llama4ForConditionalGeneration(Llama4Config(text_config=language, vision_config=vision)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(text).save_pretrained(folder)
    found = []
    for mode in ("full", "lora"):
        config = make_config(f"model_name_or_path={folder}", f"mode={mode}", "max_steps=1", output=mode)
        run([config])
        found.append(remarks_of(config, "other parts"))
    (said,), nothing = found
    assert "has other parts (vision), which are not loaded: final/ will hold the language model alone" in said
    assert not nothing


def test_a_pad_token_without_an_embedding_is_not_used(make_config, make_model, captured) -> None:
    folder = make_model(Qwen2Config)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<added_pad>"})
    tokenizer.save_pretrained(folder)
    for batching in ("padded", "padding_free"):
        more = ("per_device_train_batch_size=2", "gradient_accumulation_steps=2", f"batching={batching}")
        config = make_config(f"model_name_or_path={folder}", "max_steps=1", *more, output=batching)
        assert run([config])[0].steps == 1
        assert len(remarks_of(config, "pad token <added_pad> has no embedding in this model: <|im_end|> pads")) == 1
    assert AutoTokenizer.from_pretrained(Path(config.output_dir, "final")).pad_token == "<|im_end|>"
