"""The runs below a folder, as `sftx ls` lists them; they are read, never changed."""

from __future__ import annotations

import math
import os
import re
import shlex
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sftx.runs.saved.saved_run import TRIAL, SavedRun, is_run
from sftx.training.saving.run_folder import LOCK

INSIDE = ("checkpoints", "final", "tensorboard", "wandb")
"""Folders of a run that hold no other run."""


@dataclass(frozen=True)
class ListedRun:
    """A run, or a trial that failed before it was one."""

    path: Path
    state: str
    """running, completed, stopped, failed, or killed: its process is gone and left no reason."""
    best_loss: float | None
    """The lowest eval loss that was recorded."""
    started: str
    command: str
    """For a trial of a sweep that has ended: its overrides."""


def list_runs(folder: Path) -> list[ListedRun]:
    """Return the runs in and below a folder, the newest first."""
    found = [_listed(SavedRun(path)) for path in _run_folders(folder)]
    return sorted(found, key=lambda run: (run.started, str(run.path)), reverse=True)


def _run_folders(folder: Path) -> Iterator[Path]:
    for name, folders, files in os.walk(folder):  # links such as outputs/latest are not followed
        path = Path(name)
        if TRIAL in files or is_run(path):
            yield path
            folders[:] = [f for f in folders if f not in INSIDE]


def _listed(run: SavedRun) -> ListedRun:
    state = str(run.fact("status") or run.trial.get("status", "unknown"))
    if state == "running" and _owner_is_gone(run.path / LOCK):
        state = "killed"
    found = [record.get("eval/loss") for record in run.records.values()]
    losses = [loss for loss in found if isinstance(loss, float) and math.isfinite(loss)]
    overrides = run.trial.get("overrides")
    command = shlex.join(map(str, overrides)) if isinstance(overrides, list) else run.fact("command")
    started = run.fact("environment", "started")
    return ListedRun(run.path, state, min(losses, default=None), str(started or ""), str(command or ""))


def _owner_is_gone(lock: Path) -> bool:
    """Return True if the process that wrote its name into a lock file has ended; of another host it is not known.

    The lock itself is not tried: at that moment, a run that starts would be refused.
    """
    try:
        owner = re.match(r"process (\d+) on (\S+),", lock.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return True  # removed by its owner
    if owner is None or owner[2] != socket.gethostname():
        return False
    try:
        os.kill(int(owner[1]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        pass
    return False
