"""What becomes of a step whose loss or gradient is not finite; it never changes the weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sftx.data.feed import Step
from sftx.errors import TrainingError
from sftx.runs.metrics import drop_after
from sftx.training import checkpoint

if TYPE_CHECKING:
    from sftx.training.trial import Session, Trial

log = logging.getLogger("sftx")
MOST_IN_A_ROW = 10
"""Steps that may be skipped one after the other: more are no accident."""
MOST_ROLLBACKS = 3
SMALLER = 0.5
"""A rollback's factor on the rate."""
CURES = "Usual cures: a smaller learning_rate (now {rate:g}), warm-up, or bf16 instead of fp16."


@dataclass(frozen=True)
class Faults:
    """How often a trial met a step that is not finite, and what it did; kept in its checkpoints."""

    skipped: int = 0
    in_a_row: int = 0
    rollbacks: int = 0
    rate_factor: float = 1.0


@dataclass(frozen=True)
class Made:
    """What a step came to; the gradient norm is that before clipping."""

    loss: float
    grad_norm: float
    learning_rate: float
    finite: bool


def recover(session: Session, trial: Trial, step: Step, made: Made) -> bool:
    """Do what `on_nonfinite` says; return True when the trial stands at an earlier step.

    Errors:
        TrainingError: it says stop, or the others have not helped.
    """
    what = (
        f"step {trial.step + 1}: the loss is {made.loss:g} and the gradient norm {made.grad_norm:g}. The weights are "
        f"as before it. Rows of the step: {_some(step.origins)}."
    )
    match trial.config.on_nonfinite:
        case "skip":
            _skip(trial, what)
            return False
        case "rollback":
            _roll_back(session, trial, what)
            return True
    raise TrainingError(f"{what} {CURES.format(rate=made.learning_rate)} Or on_nonfinite=skip, or rollback.")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")


def _skip(trial: Trial, what: str) -> None:
    faults = trial.faults
    trial.faults = replace(faults, skipped=faults.skipped + 1, in_a_row=faults.in_a_row + 1)
    if trial.faults.in_a_row > MOST_IN_A_ROW:
        raise TrainingError(f"{what} {MOST_IN_A_ROW} steps before it were skipped already: this is no accident.")
    log.warning("%s It is skipped (on_nonfinite=skip).", what)


def _roll_back(session: Session, trial: Trial, what: str) -> None:
    """Go back to the newest checkpoint with a smaller rate."""
    if trial.faults.rollbacks == MOST_ROLLBACKS:
        raise TrainingError(f"{what} {MOST_ROLLBACKS} rollbacks have not helped.")
    session.saver.wait(trial)
    session.engine.barrier()
    folder, _ = checkpoint.newest_verified(trial.folder.checkpoints)
    if folder is None:
        raise TrainingError(f"{what} There is no checkpoint to go back to: set a smaller save_steps.")
    faults = replace(
        trial.faults, rollbacks=trial.faults.rollbacks + 1, rate_factor=trial.faults.rate_factor * SMALLER, in_a_row=0
    )
    trial.restore(checkpoint.load(folder, session.model, trial.adapter, trial.stepper))
    trial.faults = faults
    trial.open_feed(session)
    if session.engine.is_main:
        for records in (trial.folder.metrics, trial.folder.streamed_rows):
            drop_after(records, trial.step)
    back = f"Back to step {trial.step} ({folder}), with {faults.rate_factor:g} of the rate (on_nonfinite=rollback)."
    log.warning("%s %s", what, back)
