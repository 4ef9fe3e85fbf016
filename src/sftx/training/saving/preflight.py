"""Before the first step: is there room for what the run will write, and can it be written at all?"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

import torch

from sftx.build import build
from sftx.effective import Effective
from sftx.errors import ModelError, RunFolderError, SftxError
from sftx.files import bytes_in, free_bytes, rehearse_folder
from sftx.model.export.final import complete
from sftx.model.lora.targets import size_of
from sftx.parallel.engine import on_main
from sftx.training.saving.saver import snapshot

if TYPE_CHECKING:
    from sftx.training.trial import Session, Trial

PROBED = 64
"""Side of the matrix on which an optimizer shows how much state it keeps."""
GB = 10**9


@dataclass(frozen=True)
class Room:
    """What a trial will write, in bytes."""

    weights: int
    checkpoint: int
    kept: int
    """Checkpoints that are there at once: the last one is written before the oldest is removed."""

    @property
    def total(self) -> int:
        """All checkpoints, and `final/`."""
        return self.checkpoint * self.kept + self.weights

    def __str__(self) -> str:
        return f"{self.kept} checkpoints of {self.checkpoint / GB:.3g} GB, and {self.weights / GB:.3g} GB in final/"


def check_room(trials: Sequence[Trial], session: Session) -> None:
    """Raise when the disk has no room for what the trials will write.

    Raises:
        RunFolderError: too little is free.
    """

    def check() -> None:
        promised: dict[int, int] = defaultdict(int)
        for trial in trials:
            room, folder = room_of(trial), trial.folder
            free, disk = free_bytes(folder.path)
            there = bytes_in(folder.checkpoints) + bytes_in(folder.final)  # an earlier attempt's, which go
            promised[disk] += max(0, room.total - there)
            if promised[disk] > free:
                raise RunFolderError(
                    f"output_dir={folder.path}: {free:,} bytes are free on its disk, about {promised[disk]:,} needed: "
                    f"{room}. Free some space, lower save_total_limit, or choose another output_dir."
                )

    on_main(session.engine, check)


def room_of(trial: Trial) -> Room:
    """Return what a trial will write."""
    parameters = trial.adapter.parameters.values()
    weights = sum(size_of(p) * p.element_size() for p in parameters)
    masters = sum(4 * size_of(p) for p in parameters if p.element_size() < 4)  # a sharded engine's fp32 copies
    state = int(sum(map(size_of, parameters)) * state_bytes(trial)) + masters
    return Room(weights, weights + state, _kept(trial))


def state_bytes(trial: Trial) -> float:
    """Return the bytes of state that a trial's optimizer keeps for a parameter: of any optimizer, by trying it."""
    device = next(iter(trial.adapter.parameters.values())).device
    probe = torch.nn.Parameter(torch.zeros(PROBED, PROBED, device=device))
    optimizer = build(trial.config.optimizer).build({"probe": probe}, trial.config.learning_rate, Effective())
    probe.grad = torch.zeros_like(probe)
    optimizer.step()
    kept = [v for v in optimizer.state[probe].values() if isinstance(v, torch.Tensor) and v.ndim]
    return sum(v.nbytes for v in kept) / probe.numel()


def _kept(trial: Trial) -> int:
    config, total = trial.config, trial.steps.total
    match config.save_strategy, config.save_steps:
        case "no", _:
            saves = 1  # a signal's
        case "epoch", _:
            saves = math.ceil(total / (trial.steps.per_epoch or total))
        case _, "auto":
            saves = total if config.save_total_limit else 2  # how many is known only later
        case _, int(every):
            saves = math.ceil(total / every)
    limit = config.save_total_limit
    return saves if limit is None else min(saves, limit + 1 + config.keep_best)


def rehearse(trial: Trial, session: Session) -> None:
    """Write a checkpoint and the rest of `final/` next to where they will be, and remove them; every rank calls it.

    It shows in time what cannot be written, and about how long a checkpoint takes.

    Raises:
        RunFolderError: the disk refuses it.
        ModelError: transformers or PEFT refuses it.
    """
    started = time.monotonic()
    taken = snapshot(session, trial)
    seconds: list[float] = []

    def fill(into: Path) -> None:
        assert taken is not None, "the main rank has it"
        taken.write(into)
        complete(into, session.model, trial.adapter, session.template, session.base_folder, trial.config.final_dtype)

    def write() -> None:
        assert taken is not None, "the main rank has it"
        try:
            rehearse_folder(trial.folder.path / "rehearsal", fill, taken.nbytes)
            seconds.append(time.monotonic() - started)
        except SftxError:
            raise
        except Exception as error:
            reason = shorten(f"{type(error).__name__}: {error}", 300)
            raise ModelError(
                f"final/ cannot be saved ({reason}). It was tried before the first step, and nothing was trained. "
                f"Correct {session.base_folder}, or train a corrected copy of it."
            ) from error

    on_main(session.engine, write)
    for one in seconds:
        trial.save_interval.took(one)
