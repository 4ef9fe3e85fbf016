"""How a run continues an earlier one: in which folder, whether anything is left to train, and by which command."""

from __future__ import annotations

import json
import logging
import os
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

from sftx.config.composition.command_line import bare, override_text
from sftx.config.derive import RUNS, config_hash, identity, with_output_dir
from sftx.config.schema import TrainConfig
from sftx.data.prepare import Data
from sftx.data.records.read import sha256_file
from sftx.effective import Effective
from sftx.errors import ModelError, RunFolderError
from sftx.model.loading.load import Source
from sftx.parallel.engine import Engine, on_main
from sftx.runs.result import Result
from sftx.terminal import counted
from sftx.training.saving import checkpoint
from sftx.training.saving.run_folder import MANIFEST, RunFolder
from sftx.training.trial import Trial

log = logging.getLogger("sftx")
ANCESTORS = 6
"""Parent processes that are searched for the command as it was typed."""
TRAIN = (["python", "train.py"], ["sftx", "train"])
"""How the command of a run begins that `sftx repro` did not start."""


def identity_of(config: TrainConfig, world_size: int, data: Data, source: Source) -> dict[str, Any]:
    """Return the run's identity as a manifest holds it: its settings and the content of data, model and adapter.

    Raises:
        ModelError: the adapter to start from is missing.
    """
    content = [f.sha256 for f in data.files] + [str(config.max_train_rows)]
    model = source.fingerprint(code=config.trust_remote_code)
    found = identity(config, world_size, content, model, adapter_hash(config.adapter))
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def adapter_hash(folder: str | None) -> str | None:
    """Return the hash of the adapter that a run starts from.

    Raises:
        ModelError: the folder holds no adapter.
    """
    if folder is None:
        return None
    path = Path(folder) / "adapter_model.safetensors"
    if not path.is_file():
        raise ModelError(f"adapter={folder}: holds no adapter_model.safetensors.")
    return sha256_file(path)


def open_folders(
    configs: Sequence[TrainConfig], identities: Sequence[dict[str, Any]], engine: Engine
) -> tuple[list[TrainConfig], list[RunFolder]]:
    """Choose the folders of runs without an `output_dir`, on the main rank; return the configs with all of them.

    Raises:
        RunFolderError: a folder cannot be written.
    """
    folders: list[RunFolder] = []

    def choose() -> None:
        for config, who in zip(configs, identities, strict=True):
            folders.append(RunFolder(Path(config.output_dir)) if config.output_dir else choose_folder(config, who))

    on_main(engine, choose)
    paths = engine.from_main([folder.path for folder in folders])
    folders = folders or [RunFolder(path) for path in paths]
    return [replace(c, output_dir=str(path)) for c, path in zip(configs, paths, strict=True)], folders


def choose_folder(config: TrainConfig, who: dict[str, Any]) -> RunFolder:
    """Return the newest unfinished run's folder of this identity, or else a new one; it is locked.

    Two processes that choose at the same time never get the same folder: one of them has the lock, the other tries
    the next candidate.
    """
    if config.resume == "auto" and (unfinished := _newest_unfinished(config, who)) is not None:
        return unfinished
    first = with_output_dir(config, datetime.now()).output_dir
    for number in count(1):
        folder = RunFolder(Path(f"{first}-{number}" if number > 1 else f"{first}"))
        if folder.path.exists():
            continue
        folder.check(config.resume)
        if folder.lock() is None and not (folder.path / MANIFEST).exists():
            return folder
        folder.unlock()
    raise AssertionError


def kernels_of(folder: RunFolder) -> list[str] | None:
    """Return the kernels that the run's first attempt has chosen; None: there was none."""
    with suppress(OSError, ValueError, KeyError, TypeError):  # a damaged manifest is reported when the folder is opened
        found = json.loads((folder.path / MANIFEST).read_text(encoding="utf-8"))["effective"]["settings"]["kernels"]
        return [str(name) for name in found]
    return None


def _newest_unfinished(config: TrainConfig, who: dict[str, Any]) -> RunFolder | None:
    """Return the folder, locked, of the newest run that was stopped, killed or failed after a checkpoint.

    A newer run of the same identity that is complete ends the search: there is nothing to continue.
    """
    found = Path(RUNS).glob(f"*/*-{config.train_mode}-{config_hash(config)}*")
    for path in sorted(found, reverse=True):
        folder = RunFolder(path)
        with suppress(RunFolderError):  # not readable, not writable, or a run of another identity
            if folder.earlier(who) is None or folder.lock() is not None:
                continue
            earlier = folder.earlier(who)  # the owner of the lock may have changed it meanwhile
            if earlier is not None and earlier.get("status") == "completed":
                folder.unlock()
                return None
            if earlier is not None and checkpoint.listed(folder.checkpoints):
                folder.was_chosen = True
                return folder
        folder.unlock()
    return None


def finished(trial: Trial, earlier: dict[str, Any] | None) -> Result | None:
    """Return the result of the run in a trial's folder if it is complete, or None if there are steps to be made.

    Raises:
        RunFolderError: it has more steps than the trial is to make.
    """
    folder, total = trial.folder, trial.steps.total
    facts = (earlier or {}).get("result")
    if earlier is None or earlier.get("status") != "completed" or not isinstance(facts, dict):
        return None
    steps, reason = facts.get("steps"), facts.get("stop_reason")
    if trial.config.resume != "auto" or not isinstance(steps, int) or not folder.final.is_dir():
        return None
    if reason is None and total > steps:
        return None
    refuse_shorter(trial, steps, str(folder.path))
    newest = max(checkpoint.listed(folder.checkpoints), key=checkpoint.step_of, default=None)
    longer = "set a larger max_steps or num_train_epochs"
    if reason is not None:
        longer = f"output_dir=NEW resume={newest}" if newest else "choose another output_dir"
    result = Result(folder.path, steps, facts.get("eval_loss_before"), facts.get("eval_loss"), reason)
    loss = "" if result.eval_loss is None else f", eval loss {result.eval_loss:.4f}"
    log.info(
        "%s is finished (%s%s%s). Nothing was trained or written. To train longer: %s. To train again: another "
        "output_dir.",
        folder.path, counted(steps, "step"), loss, f"; {reason}" if reason else "", longer,
    )  # fmt: skip
    return result


def refuse_shorter(trial: Trial, step: int, where: str) -> None:
    """Raise if a trial is to end before the step at which it would continue.

    Raises:
        RunFolderError: it is.
    """
    config, total = trial.config, trial.steps.total
    if step > total:
        key = "num_train_epochs" if config.max_steps is None else "max_steps"
        value = config.num_train_epochs if config.max_steps is None else config.max_steps
        raise RunFolderError(
            f"{key}={value:.15g} ends at step {total}, and {where} is at step {step} already. Nothing was changed. "
            f"Choose at least {step} steps, or another output_dir."
        )


def remark_on_length(trial: Trial, before: int | None, effective: Effective) -> None:
    """Remark that a longer or shorter run changes the lr, where the schedule depends on the number of steps."""
    total, step = trial.steps.total, trial.step
    if before is None or before == total or step >= total:
        return
    peak = trial.config.learning_rate * trial.faults.lr_factor

    def lr(at: int, steps: int) -> float:
        return peak * trial.schedule.at(at, steps)

    last = min(before, total) - 1
    if lr(step, before) != lr(step, total) or lr(last, before) != lr(last, total):
        effective.remark(
            f"{counted(total, 'step')} instead of {before} change the schedule {trial.config.lr_scheduler_type}: after "
            f"step {step} lr {_short(lr(step, before))} -> {_short(lr(step, total))}"
        )


def _short(number: float) -> str:
    """Write 1.2e-05 as 1.2e-5."""
    digits, _, power = f"{number:.1e}".partition("e")
    return f"{digits}e{int(power)}" if number else "0"


def resume_command(command: str, config: TrainConfig, folder: Path) -> str:
    """Return the command that continues a stopped run, quoted for a shell; `config` is as it was typed.

    It is the command of this process with its interpreter, or that of the launcher above it.
    """
    words = shlex.split(command)
    start, typed = as_typed(words), words[2:]
    if words[:2] in TRAIN:
        changed = {"resume"} | ({"output_dir"} if config.output_dir is None else set())
        typed = [word for word in typed if bare(word.partition("=")[0]) not in changed]
        if config.output_dir is None:
            typed.append(override_text("output_dir", str(folder)))
        if config.resume != "auto":
            typed.append("resume=auto")  # of a checkpoint's path: that is behind this run by now
    return shlex.join([*start, *typed])


def as_typed(words: Sequence[str]) -> list[str]:
    """Return how the program of a command was started, from the list of processes: `torchrun ... train.py`."""
    tail, found, pid = list(words[1:]), list(words[:2]), os.getpid()
    with suppress(OSError, ValueError, IndexError):  # there is no /proc
        for _ in range(ANCESTORS):
            line = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "surrogateescape").split("\0")[:-1]
            program = line[-len(tail)] if len(line) > len(tail) else ""
            if Path(program).name == tail[0] and line[len(line) - len(tail) + 1 :] == tail[1:]:
                found = line[: len(line) - len(tail) + 1]
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return found
