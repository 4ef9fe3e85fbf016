"""`final/`: the trained adapter or model as plain PEFT and transformers load it, with the base's tokenizer."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from sftx.data.encode.template import ChatTemplate
from sftx.files import write_folder
from sftx.model.adapt import AdaptedModel, Adapter
from sftx.model.export.tokenizer_files import copy_tokenizer
from sftx.model.export.weights import Weights, bytes_of, weights_writer
from sftx.model_folders import weight_files

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STORED = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
"""How safetensors names them."""


def save_final(
    model: AdaptedModel,
    adapter: Adapter,
    weights: Weights,
    template: ChatTemplate,
    folder: Path,
    base: Path,
    dtype: str = "auto",
) -> None:
    """Publish `final/`: the weights, the tokenizer with its chat template, and the tokens that end a turn.

    `dtype` is a full model's: of DTYPES, or `auto`, each tensor's as the base stores it. An adapter keeps its own.
    """
    if not adapter.is_lora:
        weights = cast(weights, base, dtype)
    write_weights = weights_writer(model, adapter, weights, base)

    def fill(into: Path) -> None:
        write_weights(into)
        complete(into, model, adapter, template, base, dtype)

    write_folder(folder, fill, replace=True, needed=bytes_of(weights))


def complete(
    folder: Path, model: AdaptedModel, adapter: Adapter, template: ChatTemplate, base: Path, dtype: str
) -> None:
    """Add to what `weights_writer` wrote the rest of `final/`: configs and tokenizer."""
    if not adapter.is_lora:
        _correct_config(folder, DTYPES[final_dtype(base, dtype)])
        _add_stop_ids(folder, model.module.config, template)
    copy_tokenizer(base, template.tokenizer, template.changed, folder, alone=adapter.is_lora)


def stored_dtypes(folder: Path) -> dict[str, str]:
    """Return the number format of each tensor of a model's safetensors files, of those named in STORED."""
    from safetensors import safe_open

    found: dict[str, str] = {}
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                found |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    return {name: STORED[dtype] for name, dtype in found.items() if dtype in STORED}


def final_dtype(base: Path, dtype: str) -> str:
    """Return the number format of a full `final/`: of most tensors of its base for `auto`; fp32 if that is unknown."""
    if dtype != "auto":
        return dtype
    return next((stored for stored, _ in Counter(stored_dtypes(base).values()).most_common(1)), "fp32")


def cast(weights: Weights, base: Path, dtype: str) -> dict[str, torch.Tensor]:
    """Return floating-point weights in the number format of `final/`."""
    stored = stored_dtypes(base) if dtype == "auto" else {}
    usual = final_dtype(base, dtype)
    return {
        name: tensor.to(DTYPES[stored.get(name, usual)]) if tensor.is_floating_point() else tensor
        for name, tensor in weights.items()
    }


def _correct_config(folder: Path, dtype: torch.dtype) -> None:
    """Write the number format of the saved weights into config.json, where transformers names that of training."""

    def corrected(facts: Any) -> Any:
        if not isinstance(facts, dict):
            return facts
        changed = {key: corrected(value) for key, value in facts.items()}
        return changed | {key: str(dtype).removeprefix("torch.") for key in ("dtype", "torch_dtype") if key in facts}

    path = folder / "config.json"
    path.write_text(json.dumps(corrected(_read(path)), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _add_stop_ids(folder: Path, config: Any, template: ChatTemplate) -> None:
    """Let generation end at the base's own end tokens and at those of the chat template."""
    path = folder / "generation_config.json"
    if not path.is_file():  # a model that does not generate
        return
    facts = _read(path)
    own = facts.get("eos_token_id", config.get_text_config().eos_token_id)
    own = own if isinstance(own, list) else [own] if own is not None else []
    facts["eos_token_id"] = list(dict.fromkeys([*own, *template.stop_ids()]))
    if facts.get("pad_token_id") is None:
        facts["pad_token_id"] = template.tokenizer.pad_token_id
    path.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))
