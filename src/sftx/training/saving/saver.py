"""Asynchronous checkpoints: a copy is taken between two steps, and written while the next ones run."""

from __future__ import annotations

import json
import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sftx.model.export.weights import weights_writer
from sftx.training.saving import checkpoint
from sftx.training.saving.checkpoint import Snapshot

if TYPE_CHECKING:
    from sftx.training.trial import Session, Trial

log = logging.getLogger("sftx")
MAX_SAVE_OVERHEAD = 0.03
"""The largest share of a run's time that `save_steps=auto` spends on saving."""


class Saver:
    """Publishes the checkpoints of all trials of a call, one after the other, in its own thread.

    A trial has one checkpoint under way at most: the next waits for it, so that memory holds one copy.
    """

    def __init__(self, *, asynchronous: bool) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sftx-save") if asynchronous else None
        self._under_way: dict[str, Future[None]] = {}

    def save(self, session: Session, trial: Trial) -> None:
        """Take a copy of a trial and have it published; every rank calls it.

        Raises:
            RunFolderError, TrainingError: this checkpoint, or the trial's before it, cannot be published.
        """
        started = time.monotonic()
        taken = snapshot(session, trial)
        trial.saved_step = trial.step
        trial.save_interval.last = started
        self.wait(trial)
        session.engine.barrier()  # on a slow disk the others wait here for the main rank, which does not hang
        if taken is None:
            return
        best = trial.best_step if trial.config.keep_best else None

        def publish() -> None:
            checkpoint.publish(trial.folder.checkpoints, taken)
            checkpoint.rotate(trial.folder.checkpoints, trial.config.save_total_limit, best)
            trial.save_interval.took(time.monotonic() - started)

        if self._thread is None:
            publish()
        else:
            self._under_way[trial.name] = self._thread.submit(publish)

    def check(self, trial: Trial) -> None:
        """Raise the error of a checkpoint that is done; wait for none."""
        if trial.name in self._under_way and self._under_way[trial.name].done():
            self.wait(trial)

    def wait(self, trial: Trial) -> None:
        """Return when a trial's checkpoint is published, or raise its error."""
        future = self._under_way.pop(trial.name, None)
        if future is not None:
            future.result()

    def close(self) -> None:
        """Wait for checkpoints under way; their errors are logged, because another error has ended the run."""
        for future in self._under_way.values():
            if error := future.exception():
                log.error("a checkpoint could not be published: %s", error)
        if self._thread is not None:
            self._thread.shutdown()


def snapshot(session: Session, trial: Trial) -> Snapshot | None:
    """Return a copy of a trial in host memory, on the main rank; every rank gives its part."""
    weights, (optimizer, rest) = trial.stepper.weights(), trial.stepper.state()
    if not session.engine.is_main:
        return None
    writer = weights_writer(session.model, trial.adapter, weights, session.base_folder)
    texts = {"optimizer.json": json.dumps(rest), "state.json": json.dumps(trial.state(), indent=2)}
    return Snapshot(trial.step, weights, writer, optimizer, texts)


@dataclass
class SaveInterval:
    """When `save_steps=auto` saves: when so much work would be lost, but not so often that it costs too much."""

    lost_seconds: float
    """Work that may be lost."""
    save_seconds: float | None = None
    """What a checkpoint takes; all of it, though training waits for the copy only."""
    last: float = field(default_factory=time.monotonic)

    @property
    def interval(self) -> float:
        """Seconds between two checkpoints."""
        return max(self.lost_seconds, (self.save_seconds or 0.0) / MAX_SAVE_OVERHEAD)

    @property
    def due(self) -> bool:
        """True if it is time to save, by this rank's clock."""
        return time.monotonic() - self.last >= self.interval

    def took(self, seconds: float) -> None:
        """Note how long a checkpoint took; a single slow one does not count for ever."""
        self.save_seconds = seconds if self.save_seconds is None else (self.save_seconds + seconds) / 2
