"""What each mode leaves in `final/`: plain PEFT and transformers read it and compute the same logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sftx.errors import ConfigError
from sftx.model.lora.function import weight_of
from sftx.run import run

PROBE = torch.tensor([[5, 99, 700, 1300, 42, 2048, 7]])


def logits_of_session(captured) -> torch.Tensor:
    module = captured.session.model.module
    module.eval()
    with torch.no_grad():
        return module(input_ids=PROBE).logits


@pytest.mark.parametrize("mode", ["lora", "qlora", "full"])
def test_final_is_what_was_trained(make_config, captured, mode: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = make_config(f"mode={mode}", "learning_rate=1e-2")
    run([config])
    final = Path(config.output_dir) / "final"
    expected = logits_of_session(captured)
    if mode == "full":
        model = AutoModelForCausalLM.from_pretrained(final)
        assert set(model.generation_config.eos_token_id) == set(captured.session.template.stop_ids())
    else:
        model = in_plain_peft(final, captured)
    model.eval()
    for layer in four_bit_layers(model):
        layer.train()  # bitsandbytes then dequantizes exactly, whatever the CPU
    with torch.no_grad():
        found = model(input_ids=PROBE).logits
        base = AutoModelForCausalLM.from_pretrained(captured.session.base_folder)(input_ids=PROBE).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - base).abs().max() > 1e-2, "nothing was learned, so equality proves nothing"
    trained = four_bit_layers(captured.session.model.module)
    for layer, other in zip(four_bit_layers(model), trained, strict=True):
        assert torch.equal(weight_of(layer, torch.float32), weight_of(other, torch.float32))
    tokenizer = AutoTokenizer.from_pretrained(final)
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert rendered == captured.session.template.render([{"role": "user", "content": "hi"}], generation_prompt=True)


def test_an_adapter_of_qlora_in_bitsandbytes_bf16_kernel(make_config, captured) -> None:
    """Plain PEFT computes in bf16 on a CPU with AVX-512 BF16: the same model but for rounding, imitated elsewhere."""
    from bitsandbytes.functional import has_avx512bf16

    config = make_config("mode=qlora", "learning_rate=1e-2")
    run([config])
    expected = logits_of_session(captured)
    found = {}
    for kernel in ["imitated", *(["bitsandbytes"] if has_avx512bf16() else [])]:
        model = in_plain_peft(Path(config.output_dir) / "final", captured).eval()
        for layer in four_bit_layers(model) if kernel == "imitated" else []:
            layer.train().register_forward_hook(rounded_to_bf16)
        with torch.no_grad():
            found[kernel] = model(input_ids=PROBE).logits
        difference = (found[kernel] - expected).abs().max()
        assert 1e-5 < difference < 0.1, f"{kernel}: {difference}; the logits reach {expected.abs().max()}"
    if "bitsandbytes" in found:
        torch.testing.assert_close(found["bitsandbytes"], found["imitated"], rtol=0, atol=0.1)


def rounded_to_bf16(layer, inputs, output) -> torch.Tensor:
    """Return a 4-bit layer's output with inputs, weights and output rounded to bf16."""
    x, W = (tensor.bfloat16().float() for tensor in (inputs[0], weight_of(layer, torch.float32)))
    out = torch.nn.functional.linear(x, W).bfloat16().float()
    return out if layer.bias is None else out + layer.bias


def in_plain_peft(final: Path, captured):
    """Load an adapter as a user of PEFT does, on a base quantized as in training."""
    from peft import AutoPeftModelForCausalLM
    from transformers import BitsAndBytesConfig

    quantization = getattr(captured.session.model.module.config, "quantization_config", None)
    extra = {"quantization_config": BitsAndBytesConfig(**_plain(quantization))} if quantization else {}
    return AutoPeftModelForCausalLM.from_pretrained(final, dtype=torch.float32, **extra)


def four_bit_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [m for m in model.modules() if type(m).__name__ == "Linear4bit" and not hasattr(m, "lora_A")]


def _plain(quantization) -> dict[str, object]:
    values = quantization.to_dict()
    return {k: v for k, v in values.items() if k.startswith(("load_in", "bnb_4bit")) and not k.endswith("storage")}


def test_lora_adapts_every_linear_layer_of_attention_and_mlp_and_not_the_head(make_config, captured) -> None:
    run([make_config("mode=lora", "max_steps=1")])
    names = list(captured.trial.adapter.parameters)
    layers = {n.split(".lora_")[0].rsplit(".", 1)[-1] for n in names}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(names) == 4 * 7 * 2
    assert not any("lm_head" in n or "embed" in n for n in names)
    frozen = [n for n, p in captured.session.model.module.named_parameters() if not p.requires_grad]
    assert frozen
    assert not any("lora_" in n for n in frozen)


def test_qlora_holds_the_base_in_nf4_with_double_quantization(make_config, captured) -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    run([make_config("mode=qlora", "max_steps=1")])
    layers = [m for m in captured.session.model.module.modules() if isinstance(m, Linear4bit)]
    assert len(layers) == 4 * 7
    for layer in layers:
        assert isinstance(layer.weight, Params4bit)
        assert layer.weight.dtype == torch.uint8
        assert layer.weight.quant_type == "nf4"
        assert layer.weight.quant_state.nested, "double quantization"
        assert layer.compute_dtype == torch.float32


def test_full_trains_every_parameter(make_config, captured) -> None:
    run([make_config("mode=full", "learning_rate=1e-3")])
    from transformers import AutoModelForCausalLM

    before = dict(AutoModelForCausalLM.from_pretrained(captured.session.base_folder).named_parameters())
    after = dict(captured.session.model.module.named_parameters())
    assert before.keys() == after.keys()
    unchanged = [n for n in before if torch.equal(before[n], after[n])]
    assert not unchanged


def test_training_goes_on_from_an_adapter(make_config, captured) -> None:
    """`adapter=` starts where that adapter ended, and rank and alpha must be the same."""
    from sftx.errors import ModelError

    first = make_config("mode=lora", output="first")
    run([first])
    ended = {n: p.detach().clone() for n, p in captured.trial.adapter.parameters.items()}
    start = Path(first.output_dir) / "final"
    second = make_config("mode=lora", f"adapter={start}", "learning_rate=1e-9", "max_steps=1", output="second")
    run([second])
    for name, parameter in captured.trial.adapter.parameters.items():
        torch.testing.assert_close(parameter.detach(), ended[name], rtol=0, atol=1e-7)
    for typed in ("lora_rank=4", "lora_alpha=32"):
        with pytest.raises(ModelError, match=f"it has rank 8 and alpha 16, but .*{typed}"):
            run([make_config("mode=lora", f"adapter={start}", typed, output="third")])


def test_keep_best_puts_the_best_state_into_final(make_config, captured) -> None:
    """A rate that is far too high gets worse: the best evaluation is not the last."""
    config = make_config(
        "mode=full", "learning_rate=0.05", "max_steps=6", "eval_steps=1", "save_steps=1", "save_strategy=steps",
        "keep_best=true", "save_total_limit=1",
    )  # fmt: skip
    result = run([config])[0]
    from sftx.training.saving.metrics import read_metrics

    losses = {
        r["step"]: r["eval/loss"] for r in read_metrics(Path(config.output_dir) / "metrics.jsonl") if "eval/loss" in r
    }
    after = {s: v for s, v in losses.items() if s > 0}
    best = min(after, key=after.get)
    assert best < 6, "the premise: it got worse"
    assert result.eval_loss == pytest.approx(after[best])
    kept = sorted(p.name for p in (Path(config.output_dir) / "checkpoints").iterdir())
    assert f"step-{best:06d}" in kept
    assert "step-000006" in kept
    from safetensors.torch import load_file

    final = load_file(Path(config.output_dir) / "final" / "model.safetensors")
    at_best = load_file(Path(config.output_dir) / "checkpoints" / f"step-{best:06d}" / "model.safetensors")
    assert all(torch.equal(final[n], at_best[n]) for n in final)


def test_early_stopping_ends_the_run(make_config, captured) -> None:
    result = run(
        [make_config("mode=full", "learning_rate=0.05", "max_steps=12", "eval_steps=1", "callback=early_stopping",
                     "callback.early_stopping.patience=2")]
    )[0]  # fmt: skip
    assert result.steps < 12
    assert "early stopping" in (result.stop_reason or "")


def test_trials_in_folders_named_by_numbers_save_and_resume_whole_adapters(make_config) -> None:
    from safetensors import safe_open

    def group(stop: str) -> list:
        common = (stop, "save_strategy=steps", "save_steps=1")
        return [make_config(*common, f"lora_rank={4 + i}", output=f"sweep/{i}") for i in range(2)]

    run(group("max_steps=1"))
    results = run(group("max_steps=2"))
    for i, result in enumerate(results):
        manifest = json.loads((result.output_dir / "manifest.json").read_text(encoding="utf-8"))
        assert [a["from_step"] for a in manifest["attempts"]] == [0, 1]
        with safe_open(result.output_dir / "final" / "adapter_model.safetensors", "pt") as file:
            saved = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 - it is no dict
        assert len(saved) == 4 * 7 * 2
        assert {min(tensor.shape) for tensor in saved} == {4 + i}
        assert manifest["model"]["trained_parameters"] == sum(tensor.numel() for tensor in saved)


@pytest.mark.parametrize("differs", ["mode.quant_type=fp4", "mode.double_quant=false"])
def test_trials_that_quantize_the_base_differently_do_not_share_it(make_config, differs: str) -> None:
    one, other = make_config("mode=qlora", output="1"), make_config("mode=qlora", differs, output="2")
    with pytest.raises(ConfigError, match=r"quant_type=nf4 double_quant=true and quant_type=") as caught:
        run([one, other])
    assert differs.removeprefix("mode.") in str(caught.value)
    assert not Path(one.output_dir).exists()
