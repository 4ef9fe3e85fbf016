"""`final/`: number format, end tokens and tokenizer files are the base's own, but for what training changed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from sftx.errors import ModelError
from sftx.model.loading.builtin import ensure_builtin
from sftx.model_folders import reference_to
from sftx.run import run


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A copy of the embedded model that a test may change."""
    return Path(shutil.copytree(ensure_builtin(), tmp_path / "base"))


def edit(path: Path, **facts: object) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | facts), encoding="utf-8")


def store_as(folder: Path, dtype: torch.dtype) -> None:
    tensors = load_file(folder / "model.safetensors")
    kept = {n: t.float() if n == "model.norm.weight" else t.to(dtype) for n, t in tensors.items()}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder / "config.json", dtype=str(dtype).removeprefix("torch."))


@pytest.mark.parametrize(("asked", "wanted"), [("auto", torch.bfloat16), ("fp32", torch.float32)])
def test_a_full_final_has_the_number_format_of_its_base(base: Path, make_config, asked: str, wanted) -> None:
    store_as(base, torch.bfloat16)
    config = make_config(
        "mode=full", f"model_name_or_path={base}", f"final_dtype={asked}", "learning_rate=1e-2", "max_steps=2",
        "save_strategy=steps", "save_steps=1", "keep_best=true",
    )  # fmt: skip
    run([config])
    folder = Path(config.output_dir)
    final = load_file(folder / "final" / "model.safetensors")
    assert final["model.norm.weight"].dtype == torch.float32, "as the base stores it"
    assert {t.dtype for n, t in final.items() if n != "model.norm.weight"} == {wanted}
    assert json.loads((folder / "final" / "config.json").read_text())["dtype"] == str(wanted).removeprefix("torch.")
    checkpoints = [load_file(c / "model.safetensors") for c in sorted((folder / "checkpoints").iterdir())]
    assert all(t.dtype == torch.float32 for tensors in checkpoints for t in tensors.values())
    assert any(all(torch.equal(final[n], t[n].to(final[n].dtype)) for n in final) for t in checkpoints)
    assert AutoModelForCausalLM.from_pretrained(folder / "final", dtype="auto").dtype == wanted
    settings = json.loads((folder / "manifest.json").read_text())["effective"]["settings"]
    assert settings["final_dtype"] == {torch.bfloat16: "bf16", torch.float32: "fp32"}[wanted]


def test_a_full_final_ends_where_its_base_ends(base: Path, make_config, captured) -> None:
    own = [260, 258, 266]
    edit(base / "generation_config.json", eos_token_id=own, pad_token_id=260, temperature=0.5, do_sample=True)
    config = make_config("mode=full", f"model_name_or_path={base}", "max_steps=1")
    run([config])
    final = Path(config.output_dir) / "final"
    facts = json.loads((final / "generation_config.json").read_text())
    stops = captured.session.template.stop_ids()
    assert set(stops) - set(own), "the premise: the template has end tokens of its own"
    assert facts["eos_token_id"] == [*own, *(i for i in stops if i not in own)]
    assert (facts["temperature"], facts["pad_token_id"]) == (0.5, 260)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((final / name).read_text()).get("use_cache", True) is True, name


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_the_tokenizer_files_are_the_base_s_own(base: Path, make_config, mode: str) -> None:
    edit(base / "tokenizer_config.json", of_another_program="kept")
    edit(base / "special_tokens_map.json", eos_token="<|im_end|>")
    (base / "vocab.json").write_text("{}")  # of a slow tokenizer
    (base / "merges.txt").write_text("#version: 0.2\n")
    config = make_config(f"mode={mode}", f"model_name_or_path={base}", "max_steps=1")
    run([config])
    names = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"]
    for name in [*names, "chat_template.jinja"]:
        assert (Path(config.output_dir) / "final" / name).read_bytes() == (base / name).read_bytes(), name


def test_what_training_changed_is_written_over_the_tokenizer_files(base: Path, make_config, captured) -> None:
    """Another template, and a pad token that ends no turn; all else stays, and the result loads as was trained."""
    named = [{"name": "default", "template": "{{ 'own' }}"}, {"name": "tool_use", "template": "{{ 'tools' }}"}]
    edit(base / "tokenizer_config.json", pad_token="<|im_end|>", chat_template=named, of_another_program="kept")
    config_file = json.loads((base / "tokenizer_config.json").read_text())
    del config_file["tokenizer_class"]
    (base / "tokenizer_config.json").write_text(json.dumps(config_file))
    (base / "chat_template.jinja").unlink()
    config = make_config("mode=lora", f"model_name_or_path={base}", "template_name=qwen3", "max_steps=1")
    run([config])
    final, trained = Path(config.output_dir) / "final", captured.session.template
    facts = json.loads((final / "tokenizer_config.json").read_text())
    assert facts["of_another_program"] == "kept"
    assert (final / "chat_template.jinja").read_text(encoding="utf-8") == trained.source
    assert {t["name"]: t["template"] for t in facts["chat_template"]}["tool_use"] == "{{ 'tools' }}"
    assert (final / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    loaded = AutoTokenizer.from_pretrained(final)
    assert loaded.pad_token == trained.tokenizer.pad_token == "<|endoftext|>"
    text = "Hello 123, 你好！ \t\r\n  def f(x):\n\n    return '<b>' <|im_end|>\n"
    assert loaded(text).input_ids == trained.tokenizer(text).input_ids
    messages = [{"role": "user", "content": "hi"}]
    assert loaded.apply_chat_template(messages, tokenize=False) == trained.render(messages, generation_prompt=False)


def test_a_base_is_named_so_that_it_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert reference_to(Path("models/mine")) == str(tmp_path / "models" / "mine")
    snapshot = tmp_path / "hub" / "models--Qwen--Qwen2.5-0.5B" / "snapshots" / "060db6499f32"
    assert reference_to(snapshot) == "Qwen/Qwen2.5-0.5B"


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_the_card_s_code_works_as_printed_from_any_directory(
    make_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """The base was named by a relative path; the code is run elsewhere."""
    shutil.copytree(ensure_builtin(), tmp_path / "models" / "base")
    monkeypatch.chdir(tmp_path)
    config = make_config(
        f"mode={mode}",
        "model_name_or_path=models/base",
        "output_dir=run 1",
        f"train_file_path={ROOT / 'data'}",
        "max_steps=1",
    )
    run([config])
    assert used_elsewhere(tmp_path / "run 1", tmp_path).strip()


def test_the_card_s_code_builds_the_embedded_base_again(make_config, tmp_path: Path) -> None:
    config = make_config("mode=lora", "max_steps=1")
    run([config])
    result = used_elsewhere(Path(config.output_dir), tmp_path)
    name = json.loads((Path(config.output_dir) / "final" / "adapter_config.json").read_text())
    shutil.rmtree(name["base_model_name_or_path"])
    assert used_elsewhere(Path(config.output_dir), tmp_path) == result != ""


def used_elsewhere(folder: Path, tmp_path: Path) -> str:
    """Run the Python code of a model card in another directory and return what it prints."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    code = card.split("```python\n")[1].split("```")[0]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    done = subprocess.run([sys.executable, "-c", code], cwd=elsewhere, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("save_strategy", ["no", "steps"])
def test_generation_settings_that_transformers_warns_of_are_kept(base: Path, make_config, save_strategy: str) -> None:
    edit(base / "generation_config.json", temperature=0.9, top_p=0.6, do_sample=False)
    config = make_config("mode=full", f"model_name_or_path={base}", "max_steps=1", f"save_strategy={save_strategy}")
    run([config])
    facts = json.loads((Path(config.output_dir) / "final" / "generation_config.json").read_text())
    assert (facts["temperature"], facts["top_p"], facts.get("do_sample", False)) == (0.9, 0.6, False)


@pytest.mark.parametrize("save_strategy", ["no", "steps"])
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_final_that_cannot_be_saved_is_refused_before_the_first_step(
    base: Path, make_config, mode: str, save_strategy: str, captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("no such tokenizer")

    monkeypatch.setattr("sftx.model.export.final.copy_tokenizer", fail)
    config = make_config(f"mode={mode}", f"model_name_or_path={base}", f"save_strategy={save_strategy}")
    with pytest.raises(ModelError, match=r"final/ cannot be saved \(ValueError: no such tokenizer\)"):
        run([config])
    assert captured.session is None, "training was not begun"
    assert not Path(config.output_dir).exists()


def test_what_transformers_refuses_to_save_is_said_before_the_first_step(
    base: Path, make_config, monkeypatch: pytest.MonkeyPatch, captured
) -> None:
    """Some versions refuse what the test above sees kept."""

    def refuse(*_: object, **__: object) -> None:
        raise ValueError("GenerationConfig is invalid: \n- `temperature`: `do_sample` is not set\n\nFix these issues.")

    monkeypatch.setattr(GenerationConfig, "save_pretrained", refuse)
    with pytest.raises(
        ModelError, match=r"final/ cannot be saved \(ValueError: .*`temperature`: `do_sample`"
    ) as caught:
        run([make_config("mode=full", f"model_name_or_path={base}")])
    assert "\n" not in str(caught.value)
    assert f"Correct {base}" in str(caught.value)
    assert captured.session is None
