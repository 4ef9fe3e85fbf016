"""Which parameters an adapter has, and how they are counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    FalconH1Config,
    FalconH1ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from sftx.errors import ModelError
from sftx.model.adapt import AdaptedModel, Adapter
from sftx.model.export.weights import weights_writer
from sftx.model.lora.targets import Targets, check_injected, kept_whole
from sftx.model.modes import Full, Lora

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
    assert [model.facts(a)["parameters"] for a in (first, second)] == [base, base]
    assert [model.facts(a)["trained_parameters"] for a in (first, second)] == [trained, 2 * trained]
    assert model.facts(first)["adapted_layers"] == dict.fromkeys(
        ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"), 3
    )


def test_in_full_mode_all_parameters_are_trained() -> None:
    model = tiny()
    base = sum(p.numel() for p in model.module.parameters())
    facts = model.facts(model.add("default", Full(), seed=1))
    assert (facts["parameters"], facts["trained_parameters"], facts["adapted_layers"]) == (base, base, {})


# Which layers are adapted

SIZES = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 8}
MLP = {"gate_proj", "up_proj", "down_proj"}
IDS = torch.tensor([[5, 9, 60, 13, 42, 20, 7]])


def glm4_moe() -> Any:
    return Glm4MoeForCausalLM(
        Glm4MoeConfig(**SIZES, **MIXTURE, n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1)
    )


def qwen3_next() -> Any:
    config = Qwen3NextConfig(
        **SIZES | {"num_hidden_layers": 4}, **MIXTURE, num_experts=8, shared_expert_intermediate_size=8,
        linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
    )  # fmt: skip
    return Qwen3NextForCausalLM(config)


def adapted(base: Any, mode: Lora = LORA) -> tuple[AdaptedModel, Adapter]:
    torch.manual_seed(0)
    base.requires_grad_(False)
    model = AdaptedModel(base, trained_dtype=torch.float32, gradient_checkpointing=False)
    return model, model.add("default", mode, seed=1)


def layers_of(adapter: Adapter) -> set[str]:
    return {n.removeprefix("base_model.model.model.layers.").split(".lora_")[0] for n in adapter.parameters}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_of_a_mixture_attention_dense_layers_and_shared_experts_are_adapted(dropout: float) -> None:
    model, adapter = adapted(glm4_moe(), Lora(rank=2, alpha=4, dropout=dropout))
    attention = {f"{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qkvo"}
    assert layers_of(adapter) == attention | {f"0.mlp.{n}" for n in MLP} | {f"1.mlp.shared_experts.{n}" for n in MLP}
    (left_out,) = adapter.left_out
    assert left_out.startswith("the experts (")
    second = model.add("second", Lora(rank=4, alpha=4, dropout=dropout), seed=1)
    assert layers_of(second) == layers_of(adapter)
    assert {min(p.shape) for p in second.parameters.values()} == {4}


def test_a_router_is_told_from_a_layer_that_is_as_wide_as_the_experts_are_many() -> None:
    model, adapter = adapted(qwen3_next())
    assert (
        model.module.config.num_experts
        == 8
        == dict(model.module.named_modules())["base_model.model.model.layers.3.self_attn.k_proj"].out_features
    )
    found = layers_of(adapter)
    assert {f"3.self_attn.{n}_proj" for n in "qkvo"} <= found
    assert {f"0.mlp.shared_expert.{n}" for n in MLP} <= found
    assert not [n for n in found if n.endswith(("gate", "router"))]


@pytest.mark.parametrize("base", [glm4_moe, qwen3_next])
def test_plain_peft_reads_what_was_saved_of_a_mixture(tmp_path: Path, base: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    plain = base().eval()
    plain.save_pretrained(tmp_path / "base")
    model, adapter = adapted(base(), Lora(rank=2, alpha=4, dropout=0.1))
    model.module.get_base_model().load_state_dict(
        {n: dict(plain.state_dict())[n.replace(".base_layer", "")] for n in model.module.get_base_model().state_dict()
         if ".lora_" not in n}, strict=False,
    )  # fmt: skip
    for parameter in adapter.parameters.values():
        torch.nn.init.normal_(parameter, std=0.3)
    weights = {n: p.detach() for n, p in adapter.parameters.items()}
    (tmp_path / "adapter").mkdir()
    weights_writer(model, adapter, weights, tmp_path / "base")(tmp_path / "adapter")
    with torch.no_grad():
        wanted = model.module.eval()(input_ids=IDS).logits
        before = plain(input_ids=IDS).logits
        found = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()(input_ids=IDS).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert (wanted - before).abs().max() > 1e-2
    again, _ = adapted(base())
    taken_up = again.add("second", Lora(rank=2, alpha=4, dropout=0.1), seed=2, start=tmp_path / "adapter")
    for name, parameter in taken_up.parameters.items():
        assert torch.equal(parameter, weights[name.replace("second", "default")])


def test_an_adapter_whose_targets_are_a_regular_expression_keeps_them(tmp_path: Path) -> None:
    pattern = r".*layers\.\d+\.self_attn\.(q_proj|v_proj)"
    base = tiny().module
    config = LoraConfig(r=2, lora_alpha=4, target_modules=pattern, task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(tmp_path / "regex")
    model = tiny()
    adapter = model.add("default", LORA, seed=1, start=tmp_path / "regex")
    assert {n.split(".lora_")[0].rpartition(".")[2] for n in adapter.parameters} == {"q_proj", "v_proj"}
    (tmp_path / "final").mkdir()
    weights_writer(model, adapter, {n: p.detach() for n, p in adapter.parameters.items()}, tmp_path)(tmp_path / "final")
    assert json.loads((tmp_path / "final" / "adapter_config.json").read_text("utf-8"))["target_modules"] == pattern
    PeftModel.from_pretrained(tiny().module, tmp_path / "final")


# lora_target_modules

ATTENTION = {f"{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qkvo"}


@pytest.mark.parametrize(
    ("wanted", "layers"),
    [
        ("all-linear", ATTENTION | {f"{i}.mlp.{n}" for i in (0, 1) for n in MLP}),
        ("attention", ATTENTION),
        (["q_proj", "v_proj"], {f"{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qv"}),
        (["self_attn.q_proj", "layers.1.mlp.up_proj"], {"0.self_attn.q_proj", "1.self_attn.q_proj", "1.mlp.up_proj"}),
        ("q_proj", {"0.self_attn.q_proj", "1.self_attn.q_proj"}),
        (r".*layers\.1\..*(up|down)_proj", {"1.mlp.up_proj", "1.mlp.down_proj"}),
    ],
    ids=["all-linear", "attention", "names", "ends of names", "a name", "a pattern"],  # sets have no order
)
def test_adapters_are_put_on_the_layers_that_are_named_and_plain_peft_finds_them(
    tmp_path: Path, wanted: str | list[str], layers: set[str]
) -> None:
    model, adapter = adapted(tiny(2).module, Lora(rank=2, alpha=4, dropout=0.0, target_modules=wanted))
    assert layers_of(adapter) == layers
    assert adapter.left_out == []
    weights_writer(model, adapter, {n: p.detach() for n, p in adapter.parameters.items()}, tmp_path)(tmp_path)
    plain = PeftModel.from_pretrained(tiny(2).module, tmp_path)
    assert {
        n.split(".lora_")[0].partition("layers.")[2] for n, _ in plain.named_parameters() if ".lora_" in n
    } == layers


def test_attention_of_a_mixture_with_linear_attention() -> None:
    _, adapter = adapted(qwen3_next(), Lora(rank=2, alpha=4, dropout=0.0, target_modules="attention"))
    assert {n.split(".")[1] for n in layers_of(adapter)} == {"self_attn", "linear_attn"}
    assert adapter.left_out == []


def test_trials_on_one_base_may_name_other_layers() -> None:
    model = tiny(2)
    model.add("first", LORA, seed=1)
    second = model.add("second", Lora(rank=2, alpha=4, dropout=0.0, target_modules=["q_proj"]), seed=1)
    assert {n.split(".lora_")[0].rpartition(".")[2] for n in second.parameters} == {"q_proj"}


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (["q_prj", "v_proj"], "`q_prj`: no linear layer of this model (qwen2) is called that, or fits it as a pattern. "
         "Did you mean `q_proj`? Its layers: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj."),
        ("all_linear", "Did you mean `all-linear`?"),
        ("attn", "Its layers: down_proj"),
        (["lm_head", "q_proj"], "`lm_head` is outside the decoder's blocks"),
        (["embed_tokens"], "no linear layer of this model (qwen2) is called that"),
    ],
    ids=str,
)  # fmt: skip
def test_a_name_that_fits_no_layer_is_refused_and_the_nearest_proposed(wanted: str | list[str], said: str) -> None:
    with pytest.raises(ModelError) as error:
        adapted(tiny(2).module, Lora(rank=2, alpha=4, dropout=0.0, target_modules=wanted))
    assert str(error.value).startswith("lora_target_modules: ")
    assert said in str(error.value)


def test_a_router_cannot_be_named() -> None:
    base = glm4_moe()
    router = Lora(rank=2, alpha=4, dropout=0.0, target_modules=["gate"])
    with pytest.raises(ModelError, match=r"`gate`: "):
        adapted(base, router)


def test_a_saved_adapter_with_other_layers_than_those_named_is_refused(tmp_path: Path) -> None:
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(tiny().module, config).save_pretrained(tmp_path)
    attention = Lora(rank=2, alpha=4, dropout=0.0, target_modules="attention")
    with pytest.raises(ModelError, match=r"adapts other layers \(q_proj\) than lora_target_modules names \(k_proj"):
        tiny().add("default", attention, seed=1, start=tmp_path)


def test_layers_that_peft_adapts_and_nobody_asked_for_are_refused() -> None:
    model, adapter = adapted(glm4_moe())
    targets = Targets({"model.layers.0.self_attn.q_proj"}, ["q_proj"])
    with pytest.raises(ModelError, match=r"`model\.layers\.0\.mlp\.down_proj\.weight` is adapted, which was not asked"):
        check_injected(model.module, adapter.name, targets)


def test_a_mamba_layer_s_output_is_left_out_and_said() -> None:
    config = FalconH1Config(
        **SIZES, mamba_d_ssm=16, mamba_n_heads=2, mamba_d_head=8, mamba_d_state=4, mamba_n_groups=1, mamba_expand=1
    )
    _, adapter = adapted(FalconH1ForCausalLM(config))
    ends = {n.rpartition(".")[2] for n in layers_of(adapter)}
    assert ends == {*MLP, "q_proj", "k_proj", "v_proj", "o_proj", "in_proj"}
    assert adapter.left_out == ["out_proj of Mamba layers (their kernels read the weight, not the layer)"]


def test_what_peft_cannot_read_in_4_bits_and_narrow_layers_stay_whole() -> None:
    whole = kept_whole(glm4_moe())
    assert whole is not None
    assert {f"model.layers.1.mlp.shared_experts.{n}" for n in MLP} < set(whole)
    assert whole[0] == "lm_head"
    assert "model.layers.0.mlp.shared_expert_gate" in (kept_whole(qwen3_next()) or [])
