"""Load a tokenizer with its template, and a base model ready to be adapted."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftx.data.template import ChatTemplate, template_source
from sftx.errors import ConfigError, ModelError
from sftx.model import builtin
from sftx.model.family import Family
from sftx.model.find import local_folder

if TYPE_CHECKING:
    import torch

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class Source:
    """Where a model comes from: the name that was typed, its folder, and its type."""

    name: str
    folder: Path
    model_type: str

    @property
    def is_builtin(self) -> bool:
        """True for the embedded model."""
        return self.name == builtin.NAME

    def fingerprint(self) -> str:
        """Return a hash that tells two models apart: the config, and each weight file's size and name."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for pattern in WEIGHTS:
            for path in sorted(self.folder.glob(pattern)):
                digest.update(f"{path.name} {path.stat().st_size}".encode())
        return digest.hexdigest()[:16]


def find_model(name: str) -> Source:
    """Find a model by path, hub id or `qwen-tiny`, downloading it when it is a hub id not yet here.

    Errors:
        ModelError: no such model, no network, or a folder that is not a whole model.
    """
    folder = builtin.ensure_builtin() if name == builtin.NAME else local_folder(name) or _download(name)
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise ModelError(
            f"model_name_or_path={name}: {folder} holds no config.json, so it is not a model folder. "
            f"Found: {', '.join(sorted(p.name for p in folder.iterdir())[:8]) or 'nothing'}."
        )
    try:
        model_type = json.loads(config_file.read_text(encoding="utf-8"))["model_type"]
    except (ValueError, KeyError) as error:
        raise ModelError(f"{config_file}: no `model_type` can be read from it: {error!r}.") from None
    if not any(p for pattern in WEIGHTS for p in folder.glob(pattern)):
        raise ModelError(
            f"model_name_or_path={name}: {folder} holds no weights (*.safetensors). "
            f"The download may have stopped half-way: fetch the model again."
        )
    return Source(name, folder, model_type)


def _download(name: str) -> Path:
    looks_like_path = (
        name.startswith((".", "/", "~")) or name.count("/") != 1 or name.split("/")[0] in ("models", "data")
    )
    if looks_like_path:
        raise ModelError(
            f"model_name_or_path={name}: there is no such folder. Give a model's folder, a hub id such as "
            f"Qwen/Qwen2.5-0.5B-Instruct, or {builtin.NAME} for the embedded model."
            + (" `make smollm2` fetches models/smollm2-135m." if "smollm2" in name else "")
        )
    try:
        if os.environ.get("USE_MODELSCOPE", "").lower() in ("1", "true"):
            from modelscope import snapshot_download as from_modelscope

            return Path(from_modelscope(name))
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, ignore_patterns=["*.bin", "*.pth", "*.gguf", "original/*"]))
    except ImportError as error:
        raise ModelError(f"model_name_or_path={name}: ModelScope is not installed: pip install modelscope.") from error
    except Exception as error:
        raise ModelError(
            f"model_name_or_path={name}: not on this machine, and it cannot be downloaded "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}). "
            f"Without a network give the model's folder; behind a mirror set HF_ENDPOINT, or USE_MODELSCOPE=1."
        ) from error


def load_template(
    source: Source, family: Family, template_name: str | None, family_for: Callable[[str], Family | None]
) -> ChatTemplate:
    """Load a model's tokenizer and choose its template: `template_name`, else its own, else the family's.

    Errors:
        ModelError, ConfigError: no tokenizer, no template, or no pad token that is not the end token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source.folder)
    except Exception as error:
        raise ModelError(f"{source.folder}: its tokenizer cannot be loaded: {str(error).splitlines()[0]}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"{source.folder}: holds no tokenizer.json; sftx needs a fast tokenizer.")
    stops = family.stop_tokens
    if template_name is not None:
        named = family_for(template_name)
        text = template_source(named.template if named and named.template else template_name)
        stops = [*(named.stop_tokens if named else []), *stops]
    elif isinstance(tokenizer.chat_template, str):
        text = tokenizer.chat_template
    elif family.template is not None:
        text = template_source(family.template)
    else:
        raise ConfigError(
            f"template_name: {source.folder} brings no chat template and its model_type `{source.model_type}` is "
            f"not in conf/model/: choose one, for example template_name=chatml."
        )
    template = ChatTemplate(tokenizer, text, stops)
    tokenizer.chat_template = text
    _choose_pad(tokenizer, template)
    return template


def _choose_pad(tokenizer: Any, template: ChatTemplate) -> None:
    """Pad with a token that ends no turn: with pad = eos a model would never learn to stop."""
    ends = {*template.stop_tokens[:1], tokenizer.eos_token}
    if tokenizer.pad_token is not None and tokenizer.pad_token not in ends:
        return
    known = tokenizer.get_vocab()
    named = ["<|endoftext|>", "<|finetune_right_pad_id|>", "<pad>", "[PAD]", "<unk>"]
    reserved = sorted(t for t in known if "reserved" in t or "extra_" in t)
    for candidate in [*named, tokenizer.unk_token, *reserved]:
        if candidate in known and candidate not in ends:
            tokenizer.pad_token = candidate
            return
    raise ModelError("the tokenizer has no token to pad with other than the one that ends a turn.")


def load_base(source: Source, *, dtype: torch.dtype, quantization: Any, device: torch.device) -> Any:
    """Load the base model's weights.

    Errors:
        ModelError: the weights do not fit the architecture, or cannot be read.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "sdpa"}
    if quantization is not None:
        options |= {"quantization_config": quantization, "device_map": {"": device}}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source.folder, output_loading_info=True, trust_remote_code=False, **options
        )
    except Exception as error:
        raise ModelError(f"{source.folder}: its weights cannot be loaded: {str(error).splitlines()[0]}") from error
    missing = sorted(info.get("missing_keys") or [])
    if missing:
        raise ModelError(
            f"{source.folder}: {len(missing)} parameters of the architecture are not in its weights "
            f"(first: {missing[0]}); they would be random. The folder is not a whole model."
        )
    model.config.use_cache = False
    return model if quantization is not None else model.to(device)
