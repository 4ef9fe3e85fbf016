"""A run as a recipe: data, model, trials, training, what is left behind.

`run` takes a list of configurations that share base and data. A plain run is a list of one.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sftx.build import build
from sftx.config.derive import Steps, derive_steps, first_micro_batch, sequences_per_device
from sftx.config.schema import TrainConfig
from sftx.data.feed import PlannedFeed
from sftx.data.plan import Plan
from sftx.data.prepare import Data, open_data
from sftx.errors import ConfigError, StoppedError
from sftx.model.adapt import AdaptedModel
from sftx.model.family import family_named, family_of
from sftx.model.final import final_dtype
from sftx.model.limits import check_model
from sftx.model.load import Source, find_model, load_base, load_template, refuse_quantized
from sftx.model.shortcuts import lean_norms
from sftx.parallel import watch
from sftx.parallel.engine import Engine
from sftx.parallel.signals import Signals
from sftx.runs import manifest
from sftx.runs.begin import Setting, open_trial
from sftx.runs.effective import Effective
from sftx.runs.end import finish_trial, note_failure
from sftx.runs.folder import ONLY, RunFolder, RunLog
from sftx.runs.metrics import SilentRecorder
from sftx.runs.result import Result
from sftx.runs.resume import identity_of, open_folders, resume_command
from sftx.runs.third_party_log import ThirdPartyLog
from sftx.terminal import counted
from sftx.training.allocator import keep_freed_memory
from sftx.training.determinism import deterministic_kernels
from sftx.training.flops import work_of
from sftx.training.loop import train
from sftx.training.memory import memory_explained
from sftx.training.perf import reset_peak_memory
from sftx.training.precision import Numerics
from sftx.training.preflight import check_room
from sftx.training.probing import compile_limits_noted, compile_model, probe
from sftx.training.saving import SaveInterval, Saver
from sftx.training.schedulers import warmup_length
from sftx.training.trial import Session, Trial

PER_TRIAL = {
    "output_dir", "learning_rate", "lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules", "seed",
    "weight_decay", "max_grad_norm", "warmup_steps", "lr_scheduler_type", "optim", "mode", "optimizer", "scheduler",
    "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "callback",
    "tracker", "report_to", "adapter", "logging_steps", "save_steps", "eval_steps", "save_strategy",
    "save_total_limit", "keep_best", "resume", "lost_work_minutes",
}  # fmt: skip
"""Keys in which the trials of one call may differ; the others are facts of the base or the data."""


def run(configs: Sequence[TrainConfig], notes: Sequence[str] = (), command: str = "") -> list[Result]:
    """Train one trial for each configuration, over one base, and return their results.

    Raises:
        SftxError: an error that the user can fix, before anything is written where that is possible.
    """
    deterministic = deterministic_kernels(configs[0].deterministic)
    with ThirdPartyLog() as third_party, Signals() as signals, deterministic, memory_explained():
        _check_shared(configs)
        return _run(configs, notes, command, signals, third_party)


def _run(
    configs: Sequence[TrainConfig], notes: Sequence[str], command: str, signals: Signals, third_party: ThirdPartyLog
) -> list[Result]:
    first = configs[0]
    engine: Engine = build(first.parallel).start(first.device)
    reset_peak_memory(engine.device)
    run_log = RunLog(third_party, is_main=engine.is_main)
    saver = Saver(asynchronous=first.async_save)
    folders: list[RunFolder] = []
    trials: list[Trial] = []
    finished = False
    try:
        for config in configs:
            if config.output_dir is not None:
                RunFolder(Path(config.output_dir)).check(config.resume)
        effective = Effective(remarks=[*notes, *engine.remarks])
        session, data, source = _prepare(configs, engine, effective, saver, signals)
        identities = [identity_of(c, engine.world_size, data, source) for c in configs]
        configs, folders = open_folders(configs, identities, engine)
        if command and len(configs) == 1:
            session.resume_command = resume_command(command, first, folders[0].path)
        ids = [ONLY] if len(configs) == 1 else [f"trial_{i}" for i in range(len(configs))]
        trials = [
            _trial(c, f, session, data, effective.copy(), adapter_id)
            for c, f, adapter_id in zip(configs, folders, ids, strict=True)
        ]
        probe(configs[0], session, trials)
        session.work = work_of(session.model)
        compile_model(configs[0], session, trials)
        check_room(trials, session)
        command = command or manifest.command_line()
        setting = Setting(data, source, command, manifest.environment(), run_log)
        results = _train(session, trials, setting, identities)
        finished = True
        return results
    except BaseException as error:
        stopped = isinstance(error, StoppedError) or signals.received is not None
        if stopped or not watch.failed_by_another(error):
            note_failure(trials, engine, error, stopped=stopped)
        raise
    finally:
        saver.close()
        for trial in trials:
            trial.close()
        for folder in folders:
            folder.unlock()
        run_log.close()
        engine.close(together=finished)


def _train(
    session: Session, trials: Sequence[Trial], setting: Setting, identities: Sequence[dict[str, Any]]
) -> list[Result]:
    """Train the trials that are not finished already, and return the results of all."""
    results: dict[str, Result] = {}
    for trial, who in zip(trials, identities, strict=True):
        with trial.active(session):
            result = open_trial(trial, session, setting, who)
        if result is not None:
            results[trial.name] = result
    watch.tell(folders=[str(trial.folder.path) for trial in trials])
    session.engine.barrier()  # the main rank has made folders and started trackers
    gc.enable()  # disabled at startup
    unfinished = [trial for trial in trials if trial.name not in results]
    if unfinished:
        with compile_limits_noted(session, unfinished):
            train(session, unfinished)
    results |= {trial.name: finish_trial(trial, session) for trial in unfinished}
    return [results[trial.name] for trial in trials]


def _check_shared(configs: Sequence[TrainConfig]) -> None:
    first = asdict(configs[0])
    problems = []
    for other in configs[1:]:
        for key, value in asdict(other).items():
            if key not in PER_TRIAL and value != first[key]:
                problems.append(f"`{key}`: trials on one base must agree, found {first[key]!r} and {value!r}.")
    if len(configs) > 1 and any(c.train_mode == "full" for c in configs):
        problems.append("`mode=full` trains the base itself: it cannot be shared by several trials.")
    asked = build(configs[0].mode).quantization(torch.float32)
    for other in configs[1:]:
        wanted = build(other.mode).quantization(torch.float32)
        if _quantization(wanted) != _quantization(asked):
            problems.append(
                f"`mode`: trials on one base must agree on how it is quantized, found {_quantization(asked)} "
                f"and {_quantization(wanted)}. Train them in separate runs."
            )
    if problems:
        raise ConfigError(problems)


def _quantization(config: Any) -> str:
    """Return how a base is quantized, as the keys of `mode=qlora` say it."""
    if config is None:
        return "no quantization"
    double = str(config.bnb_4bit_use_double_quant).lower()
    return f"quant_type={config.bnb_4bit_quant_type} double_quant={double}"


def _prepare(
    configs: Sequence[TrainConfig], engine: Engine, effective: Effective, saver: Saver, signals: Signals
) -> tuple[Session, Data, Source]:
    """Read the data and load the base: what all trials share."""
    config = configs[0]
    _seed(config.seed)
    if engine.device.type == "cpu":
        keep_freed_memory()
    rows_for = open_data(config)
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
    data = rows_for(template)
    numerics = build(config.precision).resolve(engine.device, effective, sharded=engine.sharded)
    effective.settings |= {"device": engine.device.type, "deterministic": config.deterministic}
    base = _load(config, source, engine, numerics, effective)
    effective.remarks += check_model(base, source, data, template, config)
    if not engine.sharded:
        lean_norms(base)
    if build(config.mode).adapts:
        base.requires_grad_(False)
    model = AdaptedModel(
        base,
        trained_dtype=numerics.dtype if engine.sharded else torch.float32,
        gradient_checkpointing=_checkpointing(config, engine, effective),
        sharded=engine.sharded,
    )
    session = Session(engine, model, numerics, template, data.train, data.held_out, source.folder, saver, signals)
    return session, data, source


def _load(config: TrainConfig, source: Source, engine: Engine, numerics: Numerics, effective: Effective) -> Any:
    """Load the base as the mode wants it."""

    def use_eager(reason: str) -> None:
        effective.settings["attn_implementation"] = "eager"
        effective.fall_back("attn_implementation", "auto", "eager", reason)

    attention = attention_of(config)
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
            on_eager=use_eager if config.attn_implementation == "auto" else None,
            trust_remote_code=config.trust_remote_code,
            sharded=engine.sharded,
        )


def _checkpointing(config: TrainConfig, engine: Engine, effective: Effective) -> bool | str:
    """Return which activations are recomputed, and record a fallback."""
    asked = config.gradient_checkpointing
    if asked == "offload" and engine.device.type == "cpu":
        effective.fall_back("gradient_checkpointing", asked, "true", "a CPU has no other memory to put them into")
        asked = True
    effective.settings["gradient_checkpointing"] = asked
    return asked


def _trial(
    config: TrainConfig, folder: RunFolder, session: Session, data: Data, effective: Effective, adapter_id: str
) -> Trial:
    """Build what belongs to one trial."""
    _seed(config.seed)
    start = Path(config.adapter) if config.adapter else None
    adapter = session.model.add(adapter_id, build(config.mode), config.seed, start=start)
    if not adapter.is_lora:
        effective.settings["final_dtype"] = final_dtype(session.base_folder, config.final_dtype)
    if adapter.left_out:
        effective.remark(f"not adapted: {'; '.join(adapter.left_out)}.")
    if adapter.without_dropout and config.lora_dropout:
        reason = "PEFT adapts these weights as parameters, for which it has no dropout"
        names = ", ".join(adapter.without_dropout)
        effective.fall_back("lora_dropout", config.lora_dropout, f"0 in {names}", reason)
    world = session.engine.world_size
    feed = data.stream.feed(config, world) if data.stream else _planned(config, session, world)
    steps = derive_steps(config, feed.units, world)
    effective.settings |= {"steps": steps.total, "steps_per_epoch": steps.per_epoch, "steps_formula": steps.formula}
    _remark_on_warmup(config, steps, effective)
    optimizer = build(config.optimizer).build(adapter.parameters, config.learning_rate, effective)
    dtype = session.numerics.dtype
    return Trial(
        name=adapter_id,
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
        micro_batch=first_micro_batch(config, tried=session.engine.device.type == "cuda"),
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


def attention_of(config: TrainConfig) -> str:
    """Return the attention that a configuration means."""
    return "sdpa" if config.attn_implementation == "auto" else config.attn_implementation


def _seed(seed: int) -> None:
    """Seed every generator that code outside sftx might draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _remark_on_warmup(config: TrainConfig, steps: Steps, effective: Effective) -> None:
    warmup = warmup_length(config.warmup_steps, steps.total)
    if config.lr_scheduler_type != "constant":
        effective.settings["warmup_steps"] = warmup
        if warmup > steps.total:
            effective.remark(
                f"warmup_steps={config.warmup_steps:g} is more than the run's {counted(steps.total, 'step')}: the lr "
                f"only reaches {steps.total / warmup:.0%} of learning_rate. Usual is 5-10 %: warmup_steps=0.05."
            )
