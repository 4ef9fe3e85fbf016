"""A model's own Python files do not run unless a person types that they may."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sftx.config.checks.check import freeze
from sftx.config.composition.prepare import compose_checked, prepare
from sftx.errors import ConfigError, ModelError
from sftx.model.loading.family import Family
from sftx.model.loading.load import find_model, load_base, load_template
from sftx.model_folders import local_folder

CODE = """from pathlib import Path
Path({mark!r}).write_text("ran")
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM


class StrangeConfig(Qwen2Config):
    model_type = "strange"


class Strange(Qwen2ForCausalLM):
    config_class = StrangeConfig


class StrangeTokenizer(PreTrainedTokenizerFast):
    pass
"""
FAMILY = Family(model_types=["strange"], template="chatml", stop_tokens=["<|im_end|>"])


@pytest.fixture
def strange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Make a model that brings code, and says in all its files that it may be run; return it and the marker."""
    folder, mark = tmp_path / "strange", tmp_path / "MARKER"
    shutil.copytree(find_model("qwen-tiny").folder, folder)
    (folder / "strange_code.py").write_text(CODE.format(mark=str(mark)))
    for name, auto in (
        ("config.json", {"AutoConfig": "strange_code.StrangeConfig", "AutoModelForCausalLM": "strange_code.Strange"}),
        ("tokenizer_config.json", {"AutoTokenizer": [None, "strange_code.StrangeTokenizer"]}),
    ):
        tree = json.loads((folder / name).read_text())
        tree |= {"auto_map": auto, "trust_remote_code": True, "allow_targets": ["*"]}
        tree |= {"model_type": "strange"} if name == "config.json" else {"tokenizer_class": "StrangeTokenizer"}
        (folder / name).write_text(json.dumps(tree))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question on the terminal"))
    assert local_folder(str(folder)) == folder
    return folder, mark


def load(folder: Path, **words: Any) -> Any:
    return load_base(
        find_model(str(folder)), dtype=torch.float32, quantization=None, device=torch.device("cpu"), **words
    )


def test_it_does_not_run_by_itself(strange: tuple[Path, Path]) -> None:
    folder, mark = strange
    said = r"brings Python code of its own \(strange_code.py in .*\).* type: trust_remote_code=true"
    with pytest.raises(ModelError, match=said):
        load(folder)
    with pytest.raises(ModelError, match=said):
        load_template(find_model(str(folder)), FAMILY, None, lambda _: None)
    assert not mark.exists()


def test_it_runs_when_a_person_says_so(
    strange: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, mark = strange
    model = load(folder, trust_remote_code=True)
    assert type(model).__name__ == "Strange"
    assert mark.read_text() == "ran"
    mark.unlink()
    load_template(find_model(str(folder)), FAMILY, None, lambda _: None, trust_remote_code=True)


def test_only_a_person_can_say_so(tmp_path: Path) -> None:
    assert freeze(compose_checked([])).trust_remote_code is False
    assert freeze(compose_checked(["trust_remote_code=true"])).trust_remote_code is True
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/e.yaml").write_text("trust_remote_code: true\n")
    (tmp_path / "a.json").write_text('{"trust_remote_code": true}')
    for words in (["--config-dir", str(tmp_path), "experiment=e"], [f"args_file={tmp_path}/a.json"]):
        with pytest.raises(
            ConfigError, match="only a person may set this, on the command line: trust_remote_code=true"
        ):
            prepare(words)
        with pytest.raises(ConfigError):  # typed as well: the file is still not what it seems to be
            prepare([*words, "trust_remote_code=false"])


def test_a_run_says_that_it_trusts(make_config: Any) -> None:
    from sftx.run import run

    config = make_config("trust_remote_code=true", "allow_targets=[my_parts.*]", "max_steps=1")
    run([config])
    manifest = json.loads((Path(config.output_dir) / "manifest.json").read_text())
    assert manifest["allowed"] == {"allow_targets": ["my_parts.*"], "trust_remote_code": True}
    assert manifest["effective"]["settings"]["trust_remote_code"] is True
    said = "trust_remote_code=true: the Python files of"
    assert any(r.startswith(said) for r in manifest["effective"]["remarks"])
    assert said in (Path(config.output_dir) / "train.log").read_text()
