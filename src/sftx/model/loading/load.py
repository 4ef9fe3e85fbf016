"""Load a tokenizer with its template, and a base model ready to be adapted."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftx.data.encode.template import ChatTemplate, template_source
from sftx.errors import ConfigError, ModelError, nearest_folder
from sftx.model.kernels.attention import register
from sftx.model.loading import builtin
from sftx.model.loading.family import Family
from sftx.model.loading.markers import check_markers, eos_tokens
from sftx.model.lora.targets import kept_whole
from sftx.model_folders import local_folder, missing_files, weight_files

if TYPE_CHECKING:
    import torch

SAMPLES, SAMPLE_BYTES = 64, 16384
"""Of each weight file so many pieces of this length make its fingerprint: another training changes them all."""
NO_SDPA = 'attn_implementation="eager"'
"""What transformers proposes for an architecture without SDPA."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tiktoken.model")


@dataclass(frozen=True)
class Source:
    """Where a model comes from: the name that was typed, its folder, and its type."""

    name: str
    folder: Path
    model_type: str
    downloaded: bool = False
    """True when it was not on this machine before."""

    @property
    def is_builtin(self) -> bool:
        """True for the embedded model."""
        return self.name == builtin.NAME

    def fingerprint(self, *, code: bool = False) -> str:
        """Return a hash that tells two models apart: their config, how they read text, and samples of their weights.

        `code`: with the Python files of the folder, where they are trusted and run.
        """
        digest = hashlib.sha256()
        for name in ("config.json", *TOKENIZER_FILES, "tokenizer_config.json", "chat_template.jinja"):
            if (self.folder / name).is_file():
                digest.update(name.encode() + hashlib.sha256((self.folder / name).read_bytes()).digest())
        for path in sorted(self.folder.rglob("*.py")) if code else ():
            name = path.relative_to(self.folder).as_posix()
            digest.update(name.encode() + hashlib.sha256(path.read_bytes()).digest())
        for path in weight_files(self.folder):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                for i in range(SAMPLES):
                    file.seek(i * size // SAMPLES)
                    digest.update(file.read(SAMPLE_BYTES))
        return digest.hexdigest()[:16]


def find_model(name: str) -> Source:
    """Find a model by path, hub id or `qwen-tiny`, downloading it when it is a hub id not yet here.

    Raises:
        ModelError: no such model, no network, or a folder that is not a whole model.
    """
    here = builtin.ensure_builtin() if name == builtin.NAME else local_folder(name)
    folder = here or _download(name)
    config_file = folder / "config.json"
    missing = missing_files(folder)
    if "config.json" in missing:
        adapter = (folder / "adapter_config.json").is_file()
        raise ModelError(
            f"model_name_or_path={name}: {folder} holds no config.json, so it is not a model folder. "
            f"Found: {', '.join(sorted(p.name for p in folder.iterdir())[:8]) or 'nothing'}."
            + (f" It is an adapter: name its base here, and start from it with adapter={name}." if adapter else "")
        )
    try:
        model_type = json.loads(config_file.read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{config_file}: no `model_type` can be read from it: {error!r}.") from None
    if missing:
        raise ModelError(
            f"model_name_or_path={name}: {folder} holds no weights, or not all of them: it lacks "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}. "
            f"The download may have stopped half-way: fetch the model again."
        )
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"model_name_or_path={name}: {folder} holds an adapter (adapter_config.json) beside the model, and "
            f"transformers would load both as one. Move the adapter's files into a folder of their own; to start from "
            f"it, type adapter=<that folder>."
        )
    return Source(name, folder, model_type, downloaded=here is None)


def _download(name: str) -> Path:
    looks_like_path = (
        name.startswith((".", "/", "~")) or name.count("/") != 1 or name.split("/")[0] in ("models", "data")
    )
    if looks_like_path:
        raise ModelError(
            f"model_name_or_path={name}: there is no such folder.{nearest_folder(name)} Give a model's folder, a hub "
            f"id such as Qwen/Qwen2.5-0.5B-Instruct, or {builtin.NAME} for the embedded model."
            + (" `make smollm2` fetches models/smollm2-135m." if "smollm2" in name else "")
        )
    try:
        if os.environ.get("USE_MODELSCOPE", "").lower() in ("1", "true"):
            from modelscope import snapshot_download as from_modelscope

            return Path(from_modelscope(name))
        from huggingface_hub import HfApi, constants, snapshot_download

        # the download itself would wait for ever
        there = HfApi().model_info(name, timeout=constants.HF_HUB_ETAG_TIMEOUT).siblings or []
        _check_weights(name, [file.rfilename for file in there])
        return Path(snapshot_download(name, ignore_patterns=["*.bin", "*.pth", "*.gguf", "original/*"]))
    except ModelError:
        raise
    except ImportError as error:
        raise ModelError(f"model_name_or_path={name}: ModelScope is not installed: pip install modelscope.") from error
    except Exception as error:
        raise ModelError(
            f"model_name_or_path={name}: there is no such folder.{nearest_folder(name)} As a hub id it is in no cache "
            f"of this machine and cannot be downloaded ({type(error).__name__}: {_first_line(error).rstrip('.')}). "
            f"Without a network give the model's folder; behind a mirror set HF_ENDPOINT, or USE_MODELSCOPE=1."
        ) from error


def _check_weights(name: str, files: list[str]) -> None:
    """Raise if a hub repository has no weights that sftx downloads.

    Raises:
        ModelError: it has none as safetensors.
    """
    if files and not any(file.endswith(".safetensors") for file in files):
        pickled = [file for file in files if file.endswith((".bin", ".pth", ".pt", ".gguf"))]
        found = (
            f"only {', '.join(pickled[:3])}{', ...' if len(pickled) > 3 else ''}" if pickled else "no weights at all"
        )
        raise ModelError(
            f"model_name_or_path={name}: its hub repository has {found}, and sftx downloads .safetensors. Choose "
            f"another repository"
            + (f", or fetch it yourself: hf download {name}, then the same command." if pickled else ".")
        )


def refuse_quantized(source: Source) -> None:
    """Raise if a model's weights are stored quantized: no optimizer can train those.

    Raises:
        ModelError: they are; not for MXFP4, which transformers dequantizes.
    """
    stored = json.loads((source.folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    if stored and stored.get("quant_method") != "mxfp4":
        method = stored.get("quant_method") or "an unnamed method"
        raise ModelError(
            f"mode=full: the weights of {source.name} are stored quantized ({method}; `quantization_config` in "
            f"{source.folder / 'config.json'}) and cannot all be trained. Give the unquantized model, or mode=lora."
        )


def load_template(
    source: Source,
    family: Family,
    template_name: str | None,
    family_for: Callable[[str], Family | None],
    *,
    date: str | None = None,
    trust_remote_code: bool = False,
) -> ChatTemplate:
    """Load a model's tokenizer and choose its template: `template_name`, else its own, else the family's.

    A template that writes today's date writes `date`.

    Raises:
        ModelError, ConfigError: no tokenizer, no template, or one whose control tokens the tokenizer lacks.
    """
    from transformers import AutoTokenizer

    log_through_root()

    if not any((source.folder / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(f"{source.folder}: holds no tokenizer (tokenizer.json). Fetch the whole model again.")
    try:
        # passed even when false: by default transformers asks on the terminal
        tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        _explain_code(source, error)
        raise ModelError(f"{source.folder}: its tokenizer cannot be loaded: {_first_line(error)}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"{source.folder}: holds no tokenizer.json; sftx needs a fast tokenizer.")
    own = tokenizer.chat_template
    own = own.get("default") if isinstance(own, dict) else own
    stops = family.stop_tokens
    if template_name is not None:
        named = family_for(template_name)
        name = named.template if named and named.template else template_name
        text, origin = template_source(name), f"sftx's {name}, by template_name={template_name}"
        origin += "" if own is None else "; not the model's own"
        stops = [*(named.stop_tokens if named else []), *stops]
    elif own is not None:
        text, origin = own, "the model's own"
    elif family.template is not None:
        text, origin = template_source(family.template), f"sftx's {family.template}; the model brings none"
    else:
        raise ConfigError(
            f"template_name: {source.folder} brings no chat template and its model_type `{source.model_type}` is "
            f"not in conf/model/: choose one, for example template_name=chatml."
        )
    template = ChatTemplate(tokenizer, text, [*stops, *eos_tokens(source.folder, tokenizer)], date)
    template.origin = origin
    if remark := check_markers(template, model=source.name, own=text == own):
        template.remarks.append(remark)
    if template.date is not None:
        template.remarks.append(f"the chat template writes today's date: {template.date} in every row (template_date).")
    tokenizer.chat_template = text
    pad = tokenizer.pad_token
    _choose_pad(tokenizer, template)
    template.changed = {"chat_template": text} if text != own else {}
    template.changed |= {"pad_token": tokenizer.pad_token} if tokenizer.pad_token != pad else {}
    return template


def _choose_pad(tokenizer: Any, template: ChatTemplate) -> None:
    """Pad with a token that ends no turn where there is one; else with an end token: masks go by position."""
    ends = {*template.stop_tokens[:1], tokenizer.eos_token}
    if tokenizer.pad_token is not None and tokenizer.pad_token not in ends:
        return
    special = sorted(t.content for t in tokenizer.added_tokens_decoder.values() if t.special)
    named = ["<|endoftext|>", "<|finetune_right_pad_id|>", "<pad>", "[PAD]", tokenizer.unk_token]
    spare = [t for word in ("pad", "reserved", "unused", "extra_") for t in special if word in t.lower()]
    for candidate in [*named, *spare]:
        if candidate is not None and candidate not in ends and candidate in tokenizer.get_vocab():
            tokenizer.pad_token = candidate
            return
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or template.stop_tokens[0]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _explain_code(source: Source, error: Exception) -> None:
    """Raise a ModelError that says what to type, when a model asks to run Python files of its own."""
    if "trust_remote_code" in str(error):
        files = ", ".join(sorted(p.name for p in source.folder.glob("*.py"))) or "of another repository"
        raise ModelError(
            f"model_name_or_path={source.name}: this model brings Python code of its own ({files} in {source.folder}), "
            f"which would run as you. If you have read it and trust it, type: trust_remote_code=true"
        ) from error


def _kept_whole(source: Source, *, trust_remote_code: bool) -> list[str] | None:
    """Return the layers that stay unquantized, read from the architecture without its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation="eager", trust_remote_code=trust_remote_code
            )
    except Exception:  # noqa: BLE001 - whatever it is, it is explained when the weights are loaded
        return None
    return kept_whole(model)


def load_base(
    source: Source,
    *,
    dtype: torch.dtype,
    quantization: Any,
    device: torch.device,
    attention: str = "sdpa",
    on_eager: Callable[[str], None] | None = None,
    trust_remote_code: bool = False,
    sharded: bool = False,
) -> Any:
    """Load the base model's weights, on a GPU one after the other: the host never holds them all.

    `sharded`: DeepSpeed splits them while they are loaded. `on_eager` allows for eager attention where the
    architecture has no SDPA, and is called with the reason.

    Raises:
        ModelError: the weights do not fit the architecture, or cannot be read.
    """
    from transformers import AutoModelForCausalLM

    log_through_root()
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": register(attention)}
    if quantization is not None:
        quantization.llm_int8_skip_modules = _kept_whole(source, trust_remote_code=trust_remote_code)
        options["quantization_config"] = quantization
    placed = quantization is not None or (device.type == "cuda" and not sharded)
    if placed:
        options["device_map"] = {"": device}
    load = partial(
        AutoModelForCausalLM.from_pretrained,
        source.folder,
        output_loading_info=True,
        trust_remote_code=trust_remote_code,
    )
    try:
        try:
            model, info = load(**options)
        except (ValueError, ImportError) as error:
            if on_eager is None or attention != "sdpa" or NO_SDPA not in str(error):
                raise
            on_eager(str(error).split(" does not")[0] + " has no SDPA attention")
            model, info = load(**options | {"attn_implementation": register("eager")})
    except Exception as error:
        _explain_code(source, error)
        raise ModelError(f"{source.folder}: its weights cannot be loaded: {_first_line(error)}") from error
    missing = sorted(info.get("missing_keys") or [])
    if missing:
        raise ModelError(
            f"{source.folder}: {len(missing)} parameters of the architecture are not in its weights "
            f"(first: {missing[0]}); they would be random. The folder is not a whole model."
        )
    _evaluate_exactly(model)
    return model if placed else model.to(device)


def log_through_root() -> None:
    """Let transformers log as other packages do, not through a handler of its own that writes to the terminal."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.disable_default_handler()
    logging.enable_propagation()


def _evaluate_exactly(model: Any) -> None:
    """Let 4-bit layers dequantize exactly in evaluation and generation, as they do in training.

    On a CPU with AVX-512 BF16 bitsandbytes would repack their weights, lossily, for a kernel that computes in bf16.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
