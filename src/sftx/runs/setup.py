"""What the trials of one call share, and what belongs to each."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import torch

from sftx.build import build
from sftx.config.derive import Steps, derive_steps, first_micro_batch, sequences_per_device
from sftx.config.schema import PER_TRIAL, TrainConfig
from sftx.data.batches.feed import PlannedFeed
from sftx.data.batches.plan import Plan
from sftx.data.prepare import Data, open_data
from sftx.effective import Effective
from sftx.errors import ConfigError
from sftx.logs import ONLY
from sftx.model.adapt import Adapter
from sftx.model.export.final import final_dtype
from sftx.model.loading.limits import check_model
from sftx.model.loading.load import Source
from sftx.parallel.engine import Engine
from sftx.signals import Signals
from sftx.terminal import counted
from sftx.training.memory import keep_freed_memory
from sftx.training.opening import adapted, open_adapter, open_base, open_numerics, open_template
from sftx.training.saving.metrics import SilentRecorder
from sftx.training.saving.run_folder import RunFolder
from sftx.training.saving.saver import SaveInterval, Saver
from sftx.training.schedulers import warmup_length
from sftx.training.trial import Session, Trial


def check_shared(configs: Sequence[TrainConfig]) -> None:
    """Raise if configurations cannot share one base.

    Raises:
        ConfigError: they differ in what belongs to the base or the data.
    """
    first = asdict(configs[0])
    problems = []
    for other in configs[1:]:
        for key, value in asdict(other).items():
            if key not in PER_TRIAL and value != first[key]:
                problems.append(f"`{key}`: trials on one base must agree, found {first[key]!r} and {value!r}.")
    if len(configs) > 1 and any(c.train_mode == "full" for c in configs):
        problems.append("`mode=full` trains the base itself: it cannot be shared by several trials.")
    quantized = _quantization(configs[0])
    for other in configs[1:]:
        if _quantization(other) != quantized:
            problems.append(
                f"`mode`: trials on one base must agree on how it is quantized, found {quantized} and "
                f"{_quantization(other)}. Train them in separate runs."
            )
    if problems:
        raise ConfigError(problems)


def _quantization(config: TrainConfig) -> str:
    """Return how a base is quantized, as the keys of `mode=qlora` say it."""
    found = build(config.mode).quantization(torch.float32)
    if found is None:
        return "no quantization"
    double = str(found.bnb_4bit_use_double_quant).lower()
    return f"quant_type={found.bnb_4bit_quant_type} double_quant={double}"


def open_session(
    config: TrainConfig, engine: Engine, effective: Effective, saver: Saver, signals: Signals
) -> tuple[Session, Data, Source]:
    """Read the data and load the base: what all trials share."""
    seed_all(config.seed)
    if engine.device.type == "cpu":
        keep_freed_memory()
    rows_for = open_data(config)  # before the model: mistakes are common here, and found fast
    source, template = open_template(config, effective)
    data = rows_for(template)
    numerics = open_numerics(config, engine, effective)
    base = open_base(config, source, engine, numerics, effective)
    effective.remarks += check_model(base, source, data, template, config)
    model = adapted(base, config, engine, numerics, effective)
    session = Session(engine, model, numerics, template, data.train, data.held_out, source.folder, saver, signals)
    return session, data, source


def open_trials(
    configs: Sequence[TrainConfig],
    folders: Sequence[RunFolder],
    session: Session,
    data: Data,
    effective: Effective,
) -> list[Trial]:
    """Add an adapter for each configuration, shard the model, and build what belongs to each trial."""
    names = [ONLY] if len(configs) == 1 else [f"trial_{i}" for i in range(len(configs))]
    adapters = []
    for config, name in zip(configs, names, strict=True):
        seed_all(config.seed)
        adapters.append(open_adapter(config, session.model, name))
    session.engine.shard(session.model)
    return [
        _trial(config, folder, session, data, effective.copy(), adapter)
        for config, folder, adapter in zip(configs, folders, adapters, strict=True)
    ]


def _trial(
    config: TrainConfig, folder: RunFolder, session: Session, data: Data, effective: Effective, adapter: Adapter
) -> Trial:
    seed_all(config.seed)
    _remark_on_adapter(config, session, adapter, effective)
    world = session.engine.world_size
    feed = data.stream.feed(config, world) if data.stream else _planned(config, session, world)
    steps = derive_steps(config, feed.sequences, world)
    effective.settings |= {"steps": steps.total, "steps_per_epoch": steps.per_epoch, "steps_formula": steps.formula}
    _remark_on_warmup(config, steps, effective)
    optimizer = build(config.optimizer).build(adapter.parameters, config.learning_rate, effective)
    dtype = session.numerics.dtype
    return Trial(
        name=adapter.name,
        config=config,
        adapter=adapter,
        feed=feed,
        steps=steps,
        stepper=session.engine.stepper(session.model, adapter, optimizer, dtype, config.max_grad_norm),
        schedule=build(config.scheduler),
        callbacks={n: build(node) for n, node in config.callback.items()},
        folder=folder,
        recorder=SilentRecorder(),
        effective=effective,
        micro_batch=first_micro_batch(config, measured=session.engine.device.type == "cuda"),
        save_interval=SaveInterval(60 * config.lost_work_minutes),
    )


def _planned(config: TrainConfig, session: Session, world_size: int) -> PlannedFeed:
    plan = Plan(
        session.rows.lengths.tolist(),
        config.batching,
        config.max_seq_length,
        sequences_per_device(config) * world_size,
        config.seed,
    )
    return PlannedFeed(session.rows, plan, config.dataloader_num_workers)


def _remark_on_adapter(config: TrainConfig, session: Session, adapter: Adapter, effective: Effective) -> None:
    if not adapter.is_lora:
        effective.settings["final_dtype"] = final_dtype(session.base_folder, config.final_dtype)
    if adapter.left_out:
        effective.remark(f"not adapted: {'; '.join(adapter.left_out)}.")
    if adapter.without_dropout and config.lora_dropout:
        reason = "PEFT adapts these weights as parameters, for which it has no dropout"
        names = ", ".join(adapter.without_dropout)
        effective.fall_back("lora_dropout", config.lora_dropout, f"0 in {names}", reason)


def _remark_on_warmup(config: TrainConfig, steps: Steps, effective: Effective) -> None:
    warmup = warmup_length(config.warmup_steps, steps.total)
    if config.lr_scheduler_type != "constant":
        effective.settings["warmup_steps"] = warmup
        if warmup > steps.total:
            effective.remark(
                f"warmup_steps={config.warmup_steps:g} is more than the run's {counted(steps.total, 'step')}: the lr "
                f"only reaches {steps.total / warmup:.0%} of learning_rate. Usual is 5-10 %: warmup_steps=0.05."
            )


def seed_all(seed: int) -> None:
    """Seed every generator that code outside sftx might draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
