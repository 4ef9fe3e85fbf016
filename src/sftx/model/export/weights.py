"""What was trained, as plain PEFT and transformers write and read it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from sftx.errors import ModelError
from sftx.model.adapt import AdaptedModel, Adapter, check_fit, read_adapter
from sftx.model_folders import reference_to

Weights = Mapping[str, torch.Tensor]


def weights_writer(model: AdaptedModel, adapter: Adapter, weights: Weights, base: Path) -> Callable[[Path], None]:
    """Return what writes an adapter (`adapter_model.safetensors`, `adapter_config.json`) or a model into a folder.

    `weights` holds the trained parameters under their names in the model. Training may go on before it is called:
    it looks at nothing that training changes.
    """
    if adapter.is_lora:
        return _adapter_writer(model, adapter, weights, base)
    names = {id(p): n for n, p in adapter.parameters.items()}  # a tied parameter has two keys and one name
    state = model.module.state_dict(keep_vars=True)
    whole = {k: weights[names[id(t)]] if id(t) in names else t for k, t in state.items()}
    return lambda folder: model.module.save_pretrained(folder, state_dict=whole)


def _adapter_writer(model: AdaptedModel, adapter: Adapter, weights: Weights, base: Path) -> Callable[[Path], None]:
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    tensors = get_peft_model_state_dict(
        model.module, state_dict=dict(weights), adapter_name=adapter.name, save_embedding_layers=False
    )
    config = copy.copy(adapter.config)
    config.base_model_name_or_path = reference_to(base)
    config.inference_mode = True
    if not isinstance(config.target_modules, str):  # which PEFT reads as one regular expression
        config.target_modules = sorted(config.target_modules or [])
    config.target_parameters = sorted(config.target_parameters) if config.target_parameters else None

    def write(folder: Path) -> None:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(str(folder))

    return write


def bytes_of(*kinds: Weights) -> int:
    """Return how much room tensors take."""
    return sum(tensor.nbytes for tensors in kinds for tensor in tensors.values())


def read_weights(model: AdaptedModel, adapter: Adapter, folder: Path) -> dict[str, torch.Tensor]:
    """Return the trained parameters that `weights_writer` wrote, under their names in the model.

    transformers saves some architectures under other names and in another layout than it trains them in: those of a
    whole model are read by transformers.

    Raises:
        ModelError: they do not fit, or cannot be read.
    """
    if adapter.is_lora:
        return read_adapter(folder, adapter)
    try:
        saved, info = type(model.module).from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{folder}: its weights cannot be read: {reason}") from error
    trained = {n: p.detach() for n, p in saved.named_parameters() if n not in info["missing_keys"]}
    check_fit(trained, adapter, f"{folder}: its weights do not fit this model")
    return trained
