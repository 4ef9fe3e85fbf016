"""What the callbacks leave behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sftx.errors import ConfigError
from sftx.run import run


def test_samples_are_generated_after_each_evaluation_and_for_own_prompts(make_config, captured) -> None:
    config = make_config(
        "callback=generate_samples", "callback.generate_samples.prompts=[你是谁？]",
        "callback.generate_samples.max_new_tokens=5", "eval_steps=2", "max_steps=3",
    )  # fmt: skip
    run([config])
    lines = (Path(config.output_dir) / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    samples = [json.loads(line) for line in lines]
    assert [s["step"] for s in samples] == [2, 3]
    template = captured.session.template
    assert samples[0]["prompt"] == template.render([{"role": "user", "content": "你是谁？"}], generation_prompt=True)
    assert all(len(template.tokenizer.encode(s["answer"])) <= 6 for s in samples)


@pytest.mark.parametrize("own", [True, False])
def test_prompts_without_thinking_are_the_ones_that_were_learned(make_config, captured, own: bool) -> None:
    """Qwen3's template asks for thinking unless it is told not to; the model card says what to tell it."""
    config = make_config(
        "template_name=qwen3", "callback=generate_samples", "callback.generate_samples.max_new_tokens=1",
        *(["callback.generate_samples.prompts=[你是谁？]"] if own else []), "max_steps=1",
    )  # fmt: skip
    run([config])
    folder = Path(config.output_dir)
    sample = json.loads((folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()[0])
    row = captured.session.rows[0]
    learned = captured.session.template.tokenizer.decode(row.ids_T[: int(row.supervised_T.argmax())])
    end = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert sample["prompt"].endswith(end)
    assert learned.endswith(end)
    assert "return_dict=True, enable_thinking=False\n" in (folder / "README.md").read_text(encoding="utf-8")


def test_sampling_does_not_change_the_training(make_config) -> None:
    """It draws nothing and puts the model back into training mode, dropout included."""
    plain = make_config("lora_dropout=0.3", "eval_steps=1", output="plain")
    sampled = make_config(
        "lora_dropout=0.3",
        "eval_steps=1",
        "callback=generate_samples",
        "callback.generate_samples.max_new_tokens=3",
        output="sampled",
    )
    final = []
    for config in (plain, sampled):
        run([config])
        final.append((Path(config.output_dir) / "final" / "adapter_model.safetensors").read_bytes())
    assert final[0] == final[1]


def test_profile_writes_a_trace_and_a_table(make_config) -> None:
    config = make_config("callback=profile", "callback.profile.first_step=2", "callback.profile.steps=1", "max_steps=3")
    run([config])
    folder = Path(config.output_dir) / "profile"
    assert "aten::mm" in (folder / "table.txt").read_text()
    assert json.loads((folder / "trace.json").read_text())["traceEvents"]
    summary = json.loads((folder / "summary.json").read_text())
    shares = summary["shares"]
    assert sum(shares.values()) == pytest.approx(1, abs=1e-3)
    parts = {"matrix products of the layers", "attention", "head and loss", "optimizer", "clipping", "data"}
    assert parts <= {p for p, share in shares.items() if share > 0}
    assert summary["tokens_per_second"] > 0
    assert summary["hfu"] == summary["mfu"] > 0, "nothing was recomputed"
    assert "MFU" in (folder / "summary.txt").read_text()


def test_a_profile_longer_than_the_run_is_refused(make_config) -> None:
    with pytest.raises(ConfigError, match=r"the run has 3 steps, but steps 2 to 4"):
        run([make_config("callback=profile", "max_steps=3")])
