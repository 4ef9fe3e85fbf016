"""A run as a recipe: data, model, trials, training, what is left behind.

`run` takes a list of configurations that share base and data. A plain run is a list of one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import numpy as np
import torch

from sftx.build import build
from sftx.config.derive import Steps, derive_steps, with_output_dir
from sftx.config.options import component_of, family_of_type, options
from sftx.config.schema import TrainConfig
from sftx.data.corpus import Corpus, LoadedFile, split
from sftx.data.loader import Plan
from sftx.data.record import Record
from sftx.errors import ConfigError, DataError
from sftx.model.adapt import AdaptedModel, Lora
from sftx.model.family import Family
from sftx.model.load import Source, find_model, load_base, load_template
from sftx.parallel.engine import Engine
from sftx.runs import manifest
from sftx.runs.begin import Data, Setting, open_trial
from sftx.runs.effective import Effective
from sftx.runs.end import Result, finish_trial, note_failure
from sftx.runs.folder import ONLY, RunFolder, RunLog
from sftx.runs.metrics import SilentRecorder
from sftx.training.loop import train
from sftx.training.schedulers import warmup_length
from sftx.training.trial import Session, Trial

PER_TRIAL = {
    "output_dir", "learning_rate", "lora_rank", "lora_alpha", "lora_dropout", "seed", "weight_decay", "max_grad_norm",
    "warmup_steps", "lr_scheduler_type", "optim", "mode", "optimizer", "scheduler", "num_train_epochs", "max_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "callback", "tracker", "report_to", "adapter",
    "logging_steps", "save_steps", "eval_steps", "save_strategy", "save_total_limit", "keep_best", "resume",
}  # fmt: skip
"""Keys in which the trials of one call may differ; the others are facts of the base or the data."""


def run(configs: Sequence[TrainConfig], notes: Sequence[str] = (), command: str = "") -> list[Result]:
    """Train one trial for each configuration, over one base, and return what each came to.

    Errors:
        SftxError: whatever the user can mend, before anything is written where that is possible.
    """
    _check_shared(configs)
    first = configs[0]
    engine: Engine = build(first.parallel).start(first.device)
    run_log = RunLog(is_main=engine.is_main)
    trials: list[Trial] = []
    try:
        configs = engine.from_main([with_output_dir(c, datetime.now()) for c in configs])
        folders = [RunFolder(Path(c.output_dir or "")) for c in configs]
        for folder, config in zip(folders, configs, strict=True):
            folder.check(config.resume)
        effective = Effective(remarks=list(notes))
        session, data, source = _prepare(configs, engine, effective)
        trials = [_trial(c, f, session, effective.copy(), len(configs)) for c, f in zip(configs, folders, strict=True)]
        command = command or manifest.command_line()
        setting = Setting(data, source, command, manifest.environment(), run_log)
        for trial in trials:
            with trial.active(session):
                open_trial(trial, session, setting)
        train(session, trials)
        return [finish_trial(trial, session) for trial in trials]
    except BaseException as error:
        note_failure(trials, engine, error)
        raise
    finally:
        for trial in trials:
            trial.recorder.finish()
        run_log.close()
        engine.close()


def _check_shared(configs: Sequence[TrainConfig]) -> None:
    first = asdict(configs[0])
    problems = []
    for other in configs[1:]:
        for key, value in asdict(other).items():
            if key not in PER_TRIAL and value != first[key]:
                problems.append(f"`{key}`: trials on one base must agree, found {first[key]!r} and {value!r}.")
    if len(configs) > 1 and any(c.train_mode == "full" for c in configs):
        problems.append("`mode=full` trains the base itself: it cannot be shared by several trials.")
    if problems:
        raise ConfigError(problems)


def _prepare(configs: Sequence[TrainConfig], engine: Engine, effective: Effective) -> tuple[Session, Data, Source]:
    """Read the data and load the base: what all trials share."""
    config = configs[0]
    _seed(config.seed)
    files, records, held_out = _read(config)
    source = find_model(config.model_name_or_path)
    template = load_template(source, _family(config, source, effective), config.template_name, _family_named)
    train_rows = template.encode_all(records, config.max_seq_length)
    eval_rows = template.encode_all(held_out, config.max_seq_length)
    if held_out and not any(r.supervised_tokens for r in eval_rows.rows):
        raise DataError("no held-out row can be evaluated.")
    data = Data(files, train_rows, eval_rows)
    numerics = build(config.precision).resolve(engine.device, effective)
    mode = build(config.mode)
    dtype = numerics.dtype if engine.sharded else mode.weights_dtype(numerics.dtype)
    with engine.loading(dtype):
        base = load_base(source, dtype=dtype, quantization=mode.quantization(numerics.dtype), device=engine.device)
    if isinstance(mode, Lora):
        base.requires_grad_(False)
    model = AdaptedModel(
        base,
        trained_dtype=numerics.dtype if engine.sharded else torch.float32,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    session = Session(engine, model, numerics, template, train_rows.rows, eval_rows.rows, source.folder)
    return session, data, source


def _read(config: TrainConfig) -> tuple[list[LoadedFile], Sequence[Record], Sequence[Record]]:
    corpus: Corpus = build(config.data)
    keep = not config.remove_unused_columns
    train_file = corpus.load(config.train_file_path, config.train_file_name, key="train_file_name", keep_columns=keep)
    records: Sequence[Record] = train_file.records[: config.max_train_rows]
    if config.eval_file_name is not None:
        eval_file = corpus.load(config.train_file_path, config.eval_file_name, key="eval_file_name", keep_columns=keep)
        if eval_file.sha256 == train_file.sha256:
            raise DataError(
                f"eval_file_name={config.eval_file_name}: is the training file itself: nothing is held out."
            )
        return [train_file, eval_file], records, eval_file.records[: config.eval_max_rows]
    records, held_out = split(records, config.eval_ratio, config.eval_max_rows)
    if config.eval_ratio > 0 and not held_out:
        raise DataError(
            f"{train_file.path}: {len(records)} rows are too few to hold some out: set eval_ratio=0 or eval_file_name."
        )
    return [train_file], records, held_out


def _family(config: TrainConfig, source: Source, effective: Effective) -> Family:
    """Return the family's facts; a hub id that had to be downloaded tells its own type only now."""
    family: Family = build(config.model)
    own = _family_named(source.model_type)
    if not source.downloaded or own is None or source.model_type in family.model_types:
        return family
    effective.remark(f"the model's own type is {source.model_type}: its family's facts are used, not those composed")
    return own


def _family_named(name: str) -> Family | None:
    """Return the family called `name`, or that covers the model_type `name`; None when sftx knows neither."""
    option = name if name in options("model") else family_of_type(name)
    if option is None:
        return None
    return build(component_of("model", option))


def _trial(config: TrainConfig, folder: RunFolder, session: Session, effective: Effective, count_: int) -> Trial:
    """Build what belongs to one trial."""
    _seed(config.seed)
    name = ONLY if count_ == 1 else folder.path.name.replace(".", "_")
    start = Path(config.adapter) if config.adapter else None
    adapter = session.model.add(name, build(config.mode), config.seed, start=start)
    steps = derive_steps(config, len(session.rows), session.engine.world_size)
    effective.settings |= {"steps": steps.total, "steps_per_epoch": steps.per_epoch, "steps_formula": steps.formula}
    _remark_on_warmup(config, steps, effective)
    optimizer = build(config.optimizer).build(adapter.parameters, config.learning_rate, effective)
    dtype = session.numerics.dtype
    return Trial(
        name=name,
        config=config,
        adapter=adapter,
        plan=Plan(
            len(session.rows),
            config.per_device_train_batch_size,
            config.gradient_accumulation_steps,
            session.engine.world_size,
            config.seed,
        ),
        steps=steps,
        stepper=session.engine.stepper(session.model, adapter, optimizer, dtype, config.max_grad_norm),
        schedule=build(config.scheduler),
        callbacks={n: build(node) for n, node in config.callback.items()},
        folder=folder,
        recorder=SilentRecorder(),
        effective=effective,
    )


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
                f"warmup_steps={config.warmup_steps:g} is more than the run's {steps.total} steps: the rate only "
                f"reaches {steps.total / warmup:.0%} of learning_rate. Usual is 5-10 %: warmup_steps=0.05."
            )
