"""Opens a model as a configuration describes it: for training, and for commands that need one without training."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sftx.build import build
from sftx.config.schema import TrainConfig
from sftx.data.encode.template import ChatTemplate
from sftx.effective import Effective
from sftx.logs import ONLY
from sftx.model.adapt import AdaptedModel, Adapter
from sftx.model.loading.family import family_named, family_of
from sftx.model.loading.load import Source, find_model, load_base, load_template, refuse_quantized
from sftx.parallel.device import choose_device
from sftx.parallel.engine import Engine
from sftx.training.precision import Numerics


@dataclass(frozen=True)
class OpenModel:
    """A base with the adapter that a configuration names, or a new one, ready to compute."""

    model: AdaptedModel
    adapter: Adapter
    template: ChatTemplate
    source: Source
    numerics: Numerics
    engine: Engine
    effective: Effective = field(default_factory=Effective)
    """The settings in force and the fallbacks of this machine."""


def open_model(config: TrainConfig) -> OpenModel:
    """Open a model in this process without training it.

    Raises:
        ModelError: it cannot be loaded.
        ConfigError: the device or the precision is not to be had.
    """
    engine = Engine(choose_device(config.device, 0))
    effective = Effective()
    source, template = open_template(config, effective)
    numerics = open_numerics(config, engine, effective)
    base = open_base(config, source, engine, numerics, effective)
    model = adapted(base, config, engine, numerics, effective)
    adapter = open_adapter(config, model, ONLY)
    return OpenModel(model, adapter, template, source, numerics, engine, effective)


def open_template(config: TrainConfig, effective: Effective) -> tuple[Source, ChatTemplate]:
    """Find a model's files and load its tokenizer and chat template."""
    source = find_model(config.model_name_or_path)
    if config.train_mode == "full":
        refuse_quantized(source)
    family, remark = family_of(config.model, source.model_type, downloaded=source.downloaded)
    effective.remarks += remark
    trust = config.trust_remote_code
    if trust:
        effective.remark(
            f"trust_remote_code=true: the Python files of {source.folder} run as you. Leave it out if you have not "
            f"read them."
        )
    effective.settings["trust_remote_code"] = trust
    template = load_template(
        source, family, config.template_name, family_named, date=config.template_date, trust_remote_code=trust
    )
    effective.settings |= {"chat_template": template.origin, "template_date": template.date}
    effective.remarks += template.remarks
    return source, template


def open_numerics(config: TrainConfig, engine: Engine, effective: Effective) -> Numerics:
    """Return the number format that the device computes in."""
    numerics: Numerics = build(config.precision).resolve(engine.device, effective, sharded=engine.sharded)
    effective.settings |= {"device": engine.device.type, "deterministic": config.deterministic}
    return numerics


def open_base(config: TrainConfig, source: Source, engine: Engine, numerics: Numerics, effective: Effective) -> Any:
    """Load the base as the mode wants it."""

    def use_eager(reason: str) -> None:
        effective.settings["attn_implementation"] = "eager"
        effective.fall_back("attn_implementation", "auto", "eager", reason)

    automatic = config.attn_implementation == "auto"
    attention = "sdpa" if automatic else config.attn_implementation
    effective.settings["attn_implementation"] = attention
    mode = build(config.mode)
    dtype = numerics.dtype if engine.sharded else mode.weights_dtype(numerics.dtype)
    with engine.loading(dtype):
        return load_base(
            source,
            dtype=dtype,
            quantization=mode.quantization(numerics.dtype),
            device=engine.device,
            attention=attention,
            on_eager=use_eager if automatic else None,
            trust_remote_code=config.trust_remote_code,
            sharded=engine.sharded,
        )


def adapted(base: Any, config: TrainConfig, engine: Engine, numerics: Numerics, effective: Effective) -> AdaptedModel:
    """Return the model around a base to which adapters can be added."""
    if build(config.mode).adapts:
        base.requires_grad_(False)
    checkpointing = config.gradient_checkpointing
    if checkpointing == "offload" and engine.device.type == "cpu":
        reason = "a CPU has no other memory to put them into"
        effective.fall_back("gradient_checkpointing", checkpointing, "true", reason)
        checkpointing = True
    effective.settings["gradient_checkpointing"] = checkpointing
    return AdaptedModel(
        base,
        trained_dtype=numerics.dtype if engine.sharded else torch.float32,
        gradient_checkpointing=checkpointing,
        sharded=engine.sharded,
    )


def open_adapter(config: TrainConfig, model: AdaptedModel, name: str) -> Adapter:
    """Add the adapter that the configuration names, or a new one."""
    return model.add(name, build(config.mode), config.seed, start=Path(config.adapter) if config.adapter else None)
