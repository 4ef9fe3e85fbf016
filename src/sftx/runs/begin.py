"""The start of a trial: its folder is created, or an earlier attempt is resumed, and the header is printed."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from sftx.build import build
from sftx.config.schema import TrainConfig
from sftx.data.prepare import Data
from sftx.effective import Effective
from sftx.errors import ConfigError, RunFolderError
from sftx.files import write_chunks
from sftx.logs import RunLog
from sftx.model.loading.load import Source
from sftx.runs.end import SMOLLM2
from sftx.runs.header import as_text, count, header, length_line
from sftx.runs.origin import foreign_adapter, foreign_checkpoint
from sftx.runs.result import Result
from sftx.runs.resume import finished, refuse_shorter, remark_on_length
from sftx.secrets import scrub
from sftx.terminal import counted
from sftx.training.saving import checkpoint
from sftx.training.saving.metrics import Recorder, Tracker, drop_after
from sftx.training.saving.preflight import rehearse
from sftx.training.saving.run_folder import RunFolder, point_latest
from sftx.training.saving.saver import MAX_SAVE_OVERHEAD
from sftx.training.schedulers import warmup_length
from sftx.training.trial import Session, Trial

SKIPPED_ROWS = "skipped_rows.txt"
log = logging.getLogger("sftx")


@dataclass(frozen=True)
class Setting:
    """What the manifests of all trials of a call say alike."""

    data: Data
    source: Source
    command: str
    environment: dict[str, Any]
    run_log: RunLog


def open_trial(trial: Trial, session: Session, setting: Setting, who: dict[str, Any]) -> Result | None:
    """Make the run folder, or continue the run in it, and say what will happen; `who` is the run's identity.

    Return the result of a run that is finished already; nothing is changed then.
    """
    config, folder = trial.config, trial.folder
    data, source, effective = setting.data, setting.source, trial.effective
    held = session.engine.from_main(folder.lock() if session.engine.is_main else None)
    if held is not None:  # every rank raises, or the others would wait for this one
        raise RunFolderError(held)
    earlier = folder.earlier(who)
    if (result := finished(trial, earlier)) is not None:
        return result
    resumed = _resume(trial, session, earlier)
    rehearse(trial, session)
    if not session.engine.is_main:
        return None
    _remark_on_origin(config, source, who, effective)
    attempt = {"from_step": trial.step, "command": setting.command, "started": setting.environment["started"]}
    folder.open(
        config,
        {
            "status": "running",
            "command": setting.command,
            "directory": str(Path.cwd()),
            "ranks": session.engine.world_size,
            "environment": setting.environment,
            "allowed": {"allow_targets": config.allow_targets, "trust_remote_code": config.trust_remote_code},
            "identity": who,
            "model": {"name": source.name, "folder": str(source.folder), "model_type": source.model_type}
            | session.model.facts(trial.adapter),
            "data": [f.facts() for f in data.files],
            "rows": {"train": None if data.stream else len(data.train), "eval": len(data.held_out)},
            "attempts": [*(earlier or {}).get("attempts", []), attempt],
        },
    )
    if why := point_latest(folder.path):
        effective.remark(why)
    setting.run_log.to_file(folder.log, trial.name)
    _remark_on_rows(data, folder, config, effective)
    if source.is_builtin:
        effective.remark(
            f"qwen-tiny is randomly initialized; use it only for smoke tests. For a real model: {SMOLLM2}, then "
            "model=smollm2; or model_name_or_path=<folder or hub id>."
        )
    folder.update(effective=effective.facts())
    if folder.was_chosen:
        log.info("continuing %s from step %d; resume=never starts fresh", folder.path, trial.step)
    title = f"{config.train_mode} on {source.name}"
    log.info("%s", as_text(header(title, _facts(trial, session, data, source), effective)))
    if resumed:
        log.info("%s", resumed)
    for records in (folder.metrics, folder.streamed_rows):
        # a run that starts over evaluates before its first step again, and an evaluation that is due is made again
        drop_after(records, trial.step or -1, evaluation_due=trial.evaluation_due)
    trial.recorder = Recorder(folder.metrics, _trackers(trial))
    return None


def _resume(trial: Trial, session: Session, earlier: dict[str, Any] | None) -> str | None:
    """Restore the newest intact checkpoint, if there is one; return what to log."""
    resume = trial.config.resume
    chosen: Path | None
    if resume not in ("auto", "never"):
        chosen, problems = checkpoint.named(Path(resume))
    elif earlier is None:
        return None
    else:
        chosen, problems = checkpoint.newest_verified(trial.folder.checkpoints)
    lines = [f"damaged, not used: {p}" for p in problems]
    if chosen is None:
        return "\n".join([*lines, f"resume: {trial.folder.path} holds no checkpoint: starting from step 0"])
    state = checkpoint.restore(chosen, session.model, trial)
    refuse_shorter(trial, trial.step, str(chosen))
    remark_on_length(trial, state.get("total"), trial.effective)
    if resume == "auto":  # killed after it had stopped early: it is only to be finished
        trial.stop_reason = state.get("stop_reason")
    if chosen.resolve().parent == trial.folder.checkpoints.resolve():
        trial.saved_step = trial.step
    return "\n".join([*lines, f"resumed from {chosen} (step {trial.step} of {trial.steps.total})"])


def _remark_on_origin(config: TrainConfig, source: Source, who: dict[str, Any], effective: Effective) -> None:
    """State where an adapter or a checkpoint comes from that another run made, with another base or other data."""
    if config.adapter and (remark := foreign_adapter(Path(config.adapter), source, who["model"])):
        effective.remark(remark)
    if config.resume not in ("auto", "never") and (remark := foreign_checkpoint(Path(config.resume), who)):
        effective.remark(remark)


def _remark_on_rows(data: Data, folder: RunFolder, config: TrainConfig, effective: Effective) -> None:
    """Say which rows could not be used, and which lost the end of their answer."""
    for note in (note for file in data.files for note in file.notes):
        effective.remark(note)
    invalid = sum(file.skipped_rows for file in data.files)
    if invalid:
        first = next(reason for file in data.files for reason in file.skipped())
        effective.remark(
            f"skipped {counted(invalid, 'invalid row')} (data.on_bad_rows=skip; see {SKIPPED_ROWS}), e.g. {first}"
        )
    skipped = data.left_out
    if skipped:
        effective.remark(f"skipped {counted(len(skipped), 'row')} (see {SKIPPED_ROWS}), e.g. {skipped[0]}")
    if invalid or skipped:
        reasons = chain((reason for file in data.files for reason in file.skipped()), skipped)
        write_chunks(folder.path / SKIPPED_ROWS, (f"{reason}\n".encode() for reason in reasons))
    known = (data.held_out,) if data.stream else (data.train, data.held_out)  # of a stream it is logged when it happens
    cut = [(rows.full_lengths[i], rows.origin(i)) for rows in known for i in rows.truncated]
    if cut:
        longest = max(length for length, _ in cut)
        effective.remark(
            f"truncated {counted(len(cut), 'row')} to max_seq_length={config.max_seq_length} (the longest has "
            f"{longest} tokens), e.g. {cut[0][1]}"
        )


def _trackers(trial: Trial) -> list[Tracker]:
    """Start the trackers.

    Raises:
        ConfigError: one cannot start and `on_tracker_error` is `stop`.
    """
    started: list[Tracker] = []
    for name, node in trial.config.tracker.items():
        try:
            settings = scrub(asdict(trial.config))
            started.append(build(node).start(trial.folder.path, settings, trial.step))
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            if trial.config.on_tracker_error == "stop":
                raise ConfigError(
                    f"`tracker.{name}` cannot start: {reason}. Train without it: on_tracker_error=continue, "
                    f"or report_to=none."
                ) from error
            log.warning("tracker %s cannot start and is left out: %s", name, reason)
    return started


def _facts(trial: Trial, session: Session, data: Data, source: Source) -> list[tuple[str, str]]:
    config, model = trial.config, session.model.facts(trial.adapter)
    train_file = data.files[0]
    lengths = length_line(data.train.full_lengths.tolist(), config.max_seq_length)
    many = counted(len(data.train), "training row")
    if data.stream:
        many, lengths = "streamed, not read to its end", f"first {counted(len(data.train), 'row')}: {lengths}"
    held = f"{len(data.held_out)} held out" + (f" in {data.files[1].path}" if len(data.files) > 1 else "")
    share = model["trained_parameters"] / model["parameters"]
    lr = f"{config.learning_rate:g}, {config.lr_scheduler_type}"
    if config.lr_scheduler_type != "constant":
        lr += f", {counted(warmup_length(config.warmup_steps, trial.steps.total), 'warm-up step')}"
    saves = f"every {counted(config.save_steps, 'step')}" if isinstance(config.save_steps, int) else ""
    saves = saves if config.save_strategy == "steps" else config.save_strategy
    if config.save_strategy == "steps" and config.save_steps == "auto":
        took = trial.save_interval.save_seconds or 0.0
        why = (
            ""
            if trial.save_interval.interval <= trial.save_interval.lost_seconds
            else f": at most {MAX_SAVE_OVERHEAD:.0%} of the time"
        )
        saves = f"every {trial.save_interval.interval / 60:.3g} minutes ({took:.2g} s each{why})"
    ranks, dtype = session.engine.world_size, str(session.numerics.dtype).removeprefix("torch.")
    attention = trial.effective.settings["attn_implementation"]
    compute = f"{session.numerics.device}, {dtype}, {attention}, {counted(torch.get_num_threads(), 'thread')}"
    if kernels := trial.effective.settings.get("kernels"):
        compute += f", fused kernels: {', '.join(kernels)}"
    kind = f"{source.model_type}, {count(model['parameters'])} parameters"
    if share_4 := model["share_in_4_bits"]:
        kind += f", {share_4:.0%} in 4 bits"
    return [
        ("model", f"{source.name} ({kind})"),
        ("trained", f"{count(model['trained_parameters'])} parameters ({share:.1%} of the base), {config.train_mode}"),
        ("data", f"{train_file.path} ({train_file.how_read}): {many}, {held}"),
        ("columns", " | ".join(dict.fromkeys(column for file in data.files for column in file.columns))),
        ("template", session.template.origin),
        ("length", lengths),
        ("steps", trial.steps.formula),
        ("lr", lr),
        ("saves", saves),
        ("compute", compute + (f", {ranks} processes" if ranks > 1 else "")),
        ("folder", str(trial.folder.path)),
    ]
