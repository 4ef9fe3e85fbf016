"""Save what was trained, as plain PEFT and transformers read it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from sftx.data.template import ChatTemplate
from sftx.files import write_folder
from sftx.model.adapt import AdaptedModel, Adapter


def save_weights(model: AdaptedModel, adapter: Adapter, folder: Path, base: Path) -> None:
    """Write an adapter (`adapter_model.safetensors`, `adapter_config.json`) or a whole model into a folder."""
    if adapter.is_lora:
        _save_adapter(model, adapter, folder, base)
    else:
        model.module.save_pretrained(folder)


def _save_adapter(model: AdaptedModel, adapter: Adapter, folder: Path, base: Path) -> None:
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    state = get_peft_model_state_dict(model.module, adapter_name=adapter.name, save_embedding_layers=False)
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = copy.copy(adapter.config)
    config.base_model_name_or_path = str(base)
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)
    config.save_pretrained(str(folder))


def load_weights(model: AdaptedModel, adapter: Adapter, folder: Path) -> None:
    """Put weights that `save_weights` wrote back into the model.

    Errors:
        ModelError: they do not fit.
    """
    from safetensors.torch import load_file

    from sftx.errors import ModelError
    from sftx.model.adapt import load_adapter_weights

    if adapter.is_lora:
        load_adapter_weights(model.module, adapter.name, folder)
        return
    state: dict[str, Any] = {}
    for part in sorted(folder.glob("*.safetensors")):
        if part.name.startswith("model"):
            state |= load_file(part)
    result = model.module.load_state_dict(state, strict=False)
    tied = set(getattr(model.module, "_tied_weights_keys", None) or ())
    missing = [k for k in result.missing_keys if k not in tied]
    if missing or result.unexpected_keys:
        raise ModelError(f"{folder}: its weights do not fit this model ({(missing or result.unexpected_keys)[0]}).")


def save_final(model: AdaptedModel, adapter: Adapter, template: ChatTemplate, folder: Path, base: Path) -> None:
    """Publish `final/`: the weights, the tokenizer with its chat template, and the tokens that end a turn."""

    def fill(into: Path) -> None:
        if not adapter.is_lora and model.module.generation_config is not None:
            model.module.generation_config.eos_token_id = template.stop_ids()
            model.module.generation_config.pad_token_id = template.tokenizer.pad_token_id
        save_weights(model, adapter, into, base)
        template.tokenizer.save_pretrained(into)

    write_folder(folder, fill, replace=True)
