"""A tokenizer's files: the base's own are copied byte for byte, what training changed is written over them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
PATTERNS = (
    "tokenizer.json", CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "*.model", "*.tiktoken", "tekken.json", TEMPLATE, "chat_template.json", "additional_chat_templates/*.jinja",
    "tokenization_*.py",
)  # fmt: skip
VERSION_5_ONLY = ("backend", "is_local", "local_files_only", "extra_special_tokens")
"""Keys of tokenizer_config.json that transformers 4 does not know, or reads differently."""


def copy_tokenizer(base: Path, tokenizer: Any, changed: dict[str, str], into: Path, *, alone: bool) -> None:
    """Copy the tokenizer files of a model's folder, and write into the copy what training changed.

    `save_pretrained` of transformers 5 writes files that transformers 4, llama.cpp and vLLM cannot load.

    Args:
        base: the folder that the tokenizer was loaded from.
        tokenizer: the tokenizer itself.
        changed: `chat_template` and `pad_token`, where they are not the base's own.
        into: where the copy goes.
        alone: no config.json of a model will be beside it, by which the tokenizer's class could be found.
    """
    names = set(getattr(tokenizer, "vocab_files_names", {}).values())
    for path in sorted({p for pattern in (*PATTERNS, *names) for p in base.glob(pattern) if p.is_file()}):
        copy = into / path.relative_to(base)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
    config = _read(into / CONFIG)
    updated = config | {k: v for k, v in changed.items() if k != "chat_template"}
    if alone and not {"tokenizer_class", "auto_map"} & config.keys():
        updated["tokenizer_class"] = _class_name(tokenizer)
    if (text := changed.get("chat_template")) is not None:
        (into / TEMPLATE).write_text(text, encoding="utf-8")
        if "chat_template" in config:  # some programs look only here
            updated["chat_template"] = _with_default(config["chat_template"], text)
    if updated != config:
        _write(into / CONFIG, updated)
    tokens = _read(into / "special_tokens_map.json")
    if "pad_token" in changed and tokens:
        _write(into / "special_tokens_map.json", tokens | {"pad_token": changed["pad_token"]})


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer that has no files of its own yet, so that transformers 4 and 5 load it."""
    tokenizer.save_pretrained(folder)
    written = _read(folder / CONFIG)
    config = {k: v for k, v in written.items() if k not in VERSION_5_ONLY and v is not None}
    if isinstance(extra := written.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = extra
    _write(folder / CONFIG, config | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _class_name(tokenizer: Any) -> str:
    """Return the class of a tokenizer by a name that transformers 4 knows as well."""
    name = type(tokenizer).__name__
    return "PreTrainedTokenizerFast" if name == "TokenizersBackend" else name


def _with_default(templates: Any, text: str) -> Any:
    """Return `chat_template` of a tokenizer_config.json, one text or a list of named ones, with another default."""
    if not isinstance(templates, list):
        return text
    others = [t for t in templates if t.get("name") != "default"]
    return [{"name": "default", "template": text}, *others]


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _write(path: Path, facts: dict[str, Any]) -> None:
    path.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
