"""Runs that start from what another run has made: its base and data are compared, and differences are stated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sftx.model.loading.builtin import ensure_builtin
from sftx.model.loading.load import find_model
from sftx.run import run
from sftx.runs.origin import foreign_adapter


def remarks_of(config: Any) -> list[str]:
    manifest = json.loads((Path(config.output_dir) / "manifest.json").read_text(encoding="utf-8"))
    return [r for r in manifest["effective"]["remarks"] if r.startswith(("adapter=", "resume="))]


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """The embedded model with other weights."""
    folder = Path(shutil.copytree(ensure_builtin(), tmp_path / "other"))
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(0)
    changed = {n: t + 0.01 * torch.randn_like(t) for n, t in weights.items()}
    save_file(changed, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_an_adapter_and_a_checkpoint_from_another_base_or_other_data_are_stated(
    make_config, other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saving = ("mode=lora", "save_strategy=steps", "save_steps=1")
    first = make_config(*saving, "max_steps=1", output="first")
    run([first])
    final, checkpoint = Path(first.output_dir, "final"), Path(first.output_dir, "checkpoints", "step-000001")

    same = make_config("mode=lora", f"adapter={final}", "max_steps=1", output="same")
    run([same])
    assert remarks_of(same) == []
    on_other = f"model_name_or_path={other}"
    started = make_config("mode=lora", on_other, f"adapter={final}", "max_steps=1", output="started")
    run([started])
    stated = f"adapter={final} was trained on another base (qwen-tiny): config, tokenizer or weights are not this"
    assert remarks_of(started) == [f"{stated} model's."]
    assert "was trained on another base (qwen-tiny)" in " ".join(capsys.readouterr().out.replace("│", " ").split())

    longer = make_config(*saving, f"resume={checkpoint}", output="longer")
    run([longer])
    assert remarks_of(longer) == []
    foreign = make_config(*saving, on_other, "max_train_rows=39", f"resume={checkpoint}", output="foreign")
    run([foreign])
    (said,) = remarks_of(foreign)
    assert said.startswith(f"resume={checkpoint} is of another run: ")
    assert "the training data is another" in said
    assert "the base model is another" in said


def test_without_a_manifest_the_base_that_pefts_file_names_is_compared(
    other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    adapter = tmp_path / "adapter"
    adapter.mkdir()

    def said(base: object) -> str | None:
        (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}), encoding="utf-8")
        source = find_model("qwen-tiny")
        return foreign_adapter(adapter, source, source.fingerprint())

    assert said(str(ensure_builtin())) is None
    assert said("qwen-tiny") is None
    copy = shutil.copytree(ensure_builtin(), tmp_path / "copy")
    assert said(str(copy)) is None
    assert f"another base ({other})" in (said(str(other)) or "")
    assert "names org/gone as its base, which is not on this machine" in (said("org/gone") or "")
    assert "names no model as its base" in (said(None) or "")
