"""Runs on small models of architectures that need something of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, Qwen2MoeConfig, Qwen3MoeConfig

from sftx.model.builtin import ensure_builtin
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
