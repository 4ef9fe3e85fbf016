"""Recovery from a step whose loss or gradient is not finite, or whose loss is a spike."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from sftx.data.batches.feed import Step
from sftx.errors import TrainingError
from sftx.training.saving import checkpoint
from sftx.training.saving.metrics import drop_after

if TYPE_CHECKING:
    from sftx.training.trial import Session, Trial

log = logging.getLogger("sftx")
MOST_IN_A_ROW = 10
"""Steps that may be skipped one after the other: more are no accident."""
MOST_OVERFLOWS = 20
"""Steps that the loss scaler may skip one after the other: each halves its factor, which starts at 2^16."""
MOST_ROLLBACKS = 3
SMALLER = 0.5
"""A rollback's factor on the lr."""
EMA_WARMUP_STEPS = 20
"""Steps before a loss can be called a spike."""
NEWEST = 0.05
"""Weight of the newest loss in the average."""
DEVIATIONS, LEAST_RISE = 6.0, 0.5
"""A spike is more than so many standard deviations and this share above the recent mean."""
CURES = "Usual fixes: a smaller learning_rate (now {lr:g}), warm-up, or bf16 instead of fp16."


@dataclass(frozen=True)
class Faults:
    """Counts of a trial's faulty steps, and of what was done about them; kept in its checkpoints."""

    skipped: int = 0
    """Steps that were not made: their loss or gradient was not finite, or stood far out."""
    in_a_row: int = 0
    overflows_in_a_row: int = 0
    """Of the newest steps, those that the loss scaler skipped."""
    rollbacks: int = 0
    spikes: int = 0
    """Spikes whose step was made all the same."""
    lr_factor: float = 1.0


@dataclass(frozen=True)
class LossEma:
    """Exponential moving average of a trial's loss, and its variance."""

    steps: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def is_spike(self, loss: float) -> bool:
        """Return True if a loss is far above the average."""
        far = self.mean + max(DEVIATIONS * math.sqrt(self.variance), LEAST_RISE * self.mean)
        return self.steps >= EMA_WARMUP_STEPS and math.isfinite(loss) and loss > far

    def after(self, loss: float) -> LossEma:
        """Return the average with one more loss."""
        if self.steps == 0:
            return LossEma(1, loss, 0.0)
        off = loss - self.mean
        return LossEma(self.steps + 1, self.mean + NEWEST * off, (1 - NEWEST) * (self.variance + NEWEST * off * off))


Fault = Literal["nonfinite", "overflow", "spike"]
"""An overflow is a gradient that is not finite under a loss scaler, which tries a smaller factor next."""


@dataclass(frozen=True)
class StepResult:
    """The outcome of a step; the gradient norm is that before clipping."""

    number: int
    loss: float
    grad_norm: float
    learning_rate: float
    fault: Fault | None = None


def fault_of(trial: Trial, loss: float, norm: float) -> Fault | None:
    """Return what is wrong with a step's loss and gradient norm, or None."""
    spike = trial.loss_ema.is_spike(loss)
    if not math.isfinite(loss):
        return "nonfinite"
    if spike and trial.config.on_loss_spike != "warn":
        return "spike"  # not result, whatever its gradient
    if not math.isfinite(norm):
        return "overflow" if trial.stepper.scales_loss else "nonfinite"
    return "spike" if spike else None


def recover(session: Session, trial: Trial, step: Step, result: StepResult) -> bool:
    """Do what `on_nonfinite` or `on_loss_spike` says; return True if the trial was rolled back.

    Raises:
        TrainingError: it says stop, or the others have not helped.
    """
    if result.fault == "overflow":
        _note_overflow(trial, result)
        return False
    key = "on_loss_spike" if result.fault == "spike" else "on_nonfinite"
    policy = getattr(trial.config, key)
    usual = f", after {trial.loss_ema.mean:.4g} on average" if result.fault == "spike" else ""
    weights = "The step was made" if policy == "warn" else "The weights are as before it"
    norm = (
        ""
        if result.fault == "spike" and math.isnan(result.grad_norm)
        else f", and the gradient norm {result.grad_norm:.4g}"
    )
    what = (
        f"step {result.number}: the loss is {result.loss:.4g}{usual}{norm}. "
        f"{weights}. Rows of the step: {_some(step.origins)}."
    )
    match policy:
        case "warn":
            trial.faults = replace(trial.faults, spikes=trial.faults.spikes + 1)
            log.warning("%s (%s=warn)", what, key)
            return False
        case "skip":
            _skip(trial, what, key)
            return False
        case "rollback":
            _roll_back(session, trial, what, key)
            return True
    raise TrainingError(f"{what} {CURES.format(lr=result.learning_rate)} Or {key}=skip, or rollback.")


def _note_overflow(trial: Trial, result: StepResult) -> None:
    """Count a step that the loss scaler skipped; warn of the first of several in a row.

    Raises:
        TrainingError: too many in a row.
    """
    faults = trial.faults
    row = faults.overflows_in_a_row + 1
    trial.faults = replace(faults, skipped=faults.skipped + 1, overflows_in_a_row=row)
    if row >= MOST_OVERFLOWS:
        raise TrainingError(
            f"step {result.number}: the gradient overflowed fp16 in {row} steps in a row, at ever smaller loss scales. "
            f"The weights are as before them. Use bf16=true or precision=fp32, or a smaller learning_rate "
            f"(now {result.learning_rate:g})."
        )
    if row == 1:
        log.warning(
            "step %d: the gradient overflowed fp16: the step is skipped and the loss scale lowered. This is usual in "
            "the first steps, and now and then later; train/skipped_steps counts all.",
            result.number,
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")


def _skip(trial: Trial, what: str, key: str) -> None:
    faults = trial.faults
    trial.faults = replace(faults, skipped=faults.skipped + 1, in_a_row=faults.in_a_row + 1)
    if trial.faults.in_a_row > MOST_IN_A_ROW:
        raise TrainingError(f"{what} {MOST_IN_A_ROW} steps before it were skipped already: this is no accident.")
    log.warning("%s It is skipped (%s=skip).", what, key)


def _roll_back(session: Session, trial: Trial, what: str, key: str) -> None:
    """Go back to the newest checkpoint with a smaller lr."""
    if trial.faults.rollbacks == MOST_ROLLBACKS:
        raise TrainingError(f"{what} {MOST_ROLLBACKS} rollbacks have not helped.")
    session.saver.wait(trial)
    session.engine.barrier()
    folder, _ = checkpoint.newest_verified(trial.folder.checkpoints)
    if folder is None:
        raise TrainingError(f"{what} There is no checkpoint to go back to: set a smaller save_steps.")
    faults = replace(
        trial.faults, rollbacks=trial.faults.rollbacks + 1, lr_factor=trial.faults.lr_factor * SMALLER, in_a_row=0
    )
    checkpoint.restore(folder, session.model, trial)
    trial.faults, trial.saved_step = faults, -1  # that checkpoint does not know of this rollback
    trial.open_feed(session)
    if session.engine.is_main:
        for records in (trial.folder.metrics, trial.folder.streamed_rows):
            drop_after(records, trial.step)
    back = f"Back to step {trial.step} ({folder}), with lr x {faults.lr_factor:g} ({key}=rollback)."
    log.warning("%s %s", what, back)
