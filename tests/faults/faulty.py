"""A component of a user's own that brings one rank down, in the way and at the moment that a test asks for."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftx.data.batches.collate import Batch
from sftx.errors import DataError
from sftx.parallel.engine import Engine
from sftx.parallel.settings import Ddp
from sftx.training.callbacks import Callback
from sftx.training.trial import Session, Trial


def _raise() -> None:
    raise ValueError("boom")


def _refuse() -> None:
    raise DataError("my.csv:7: a row that only this rank minds")


KINDS: dict[str, Callable[[], object]] = {
    "raises": _raise,
    "refuses": _refuse,
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "crashes": lambda: ctypes.string_at(0),
    "aborts": os.abort,
    "exits": lambda: os._exit(0),
    "leaves": lambda: sys.exit(0),
    "sleeps": lambda: time.sleep(10_000),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "works": lambda: _work(12),
    "waits": lambda: time.sleep(12),
    "is_late": lambda: time.sleep(4),
    "stops": lambda: os.kill(os.getpid(), signal.SIGTERM),
}


def _work(seconds: float) -> None:
    """Take long, and take processor time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        sum(range(10_000))


def befall(kind: str, mark: str) -> None:
    """Leave the time in a file, then do it."""
    print("about to misbehave", file=sys.stderr, flush=True)
    Path(mark).write_text(str(time.monotonic()))
    KINDS[kind]()


@dataclass
class Fault(Callback):
    """Brings one rank down after `step` steps: in the next step, in the evaluation that is due, or in the save."""

    kind: str
    rank: int
    mark: str
    moment: str = "step"
    step: int = 4

    def on_batches(self, session: Session, trial: Trial, batches: Sequence[Batch]) -> None:
        if session.engine.rank != self.rank or trial.step != self.step - (self.moment != "step"):
            return
        if self.moment == "step":
            befall(self.kind, self.mark)
        elif self.moment == "evaluation":
            from sftx.training.measure import evaluate

            self._in_place_of(evaluate, "token_losses")
        elif self.rank == 0:  # the main rank writes
            self._in_place_of(os, "fsync")
        else:
            self._in_place_of(trial.stepper, "weights")

    def _in_place_of(self, owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def once(*arguments: Any, **named: Any) -> Any:
            setattr(owner, name, original)
            befall(self.kind, self.mark)
            return original(*arguments, **named)

        setattr(owner, name, once)


@dataclass(frozen=True)
class FaultyDdp(Ddp):
    """Brings one rank down before it joins the others."""

    kind: str
    rank: int
    mark: str

    def start(self, device: str) -> Engine:
        if int(os.environ["RANK"]) == self.rank:
            befall(self.kind, self.mark)
        return super().start(device)
