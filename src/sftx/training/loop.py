"""The training loop: the only `optimizer.step()` of sftx.

It trains a list of trials, one step each in turn, over one frozen base. A trial's loss is the summed
token loss divided by the supervised tokens of its whole optimizer step, over all micro-batches and
ranks, so that neither accumulation nor the number of ranks changes the result.

When a loss is known: `_launch` gives a step to the device and returns a `PendingStep`; `_resolve` reads its loss and
decides (record, skip, roll back). On a GPU, and only if nothing depends on the loss (`Trial.defers_loss`), a step is
resolved after the next one was launched; everywhere else at once. A step that is recorded, evaluated or saved is
always resolved first.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NoReturn

import torch
from torch.profiler import record_function

from sftx.data.batches.collate import Batch
from sftx.data.batches.feed import Step
from sftx.errors import SftxError, StoppedError, is_out_of_memory
from sftx.files import append_line
from sftx.seeds import key_of
from sftx.training.loss import token_losses
from sftx.training.measure.evaluate import evaluate
from sftx.training.measure.perf import Window
from sftx.training.measure.profile import DATA
from sftx.training.measure.progress import Progress
from sftx.training.memory import shrink
from sftx.training.pending import PendingStep, StopVote
from sftx.training.recovery import StepResult, fault_of, recover
from sftx.training.saving import checkpoint
from sftx.training.trial import Session, Trial

log = logging.getLogger("sftx")


def train(session: Session, trials: Sequence[Trial], ended: Callable[[Trial], None]) -> None:
    """Train every trial to its end, and call `ended` with each one at its own end, finished or failed.

    Raises:
        StoppedError: a signal stopped the run; every trial that is not finished has left a checkpoint.
        SftxError: the only trial failed, or one whose failure the other ranks may not share.
    """
    alone = len(trials) == 1 or session.engine.world_size > 1
    session.model.module.train()
    session.signals.raise_immediately = False
    with Progress(session, trials) as progress:
        session.progress = progress
        for trial in trials:
            with _failing(trial, alone=alone):
                _start(session, trial)
        while running := [t for t in trials if not t.ended]:
            for trial in running:
                if session.stopping and (not trial.finished or trial.evaluation_due):
                    _stop(session, [t for t in running if not t.ended and t.error is None])
                if trial.error is None:
                    with _failing(trial, alone=alone), trial.active(session):
                        if not trial.finished:
                            _advance(session, trial)
                            progress.update(trial)
                        if trial.finished and not trial.evaluation_due:
                            _finish(session, trial)
                            ended(trial)
                            trial.ended = True
                if trial.error is not None:
                    ended(trial)
                    trial.ended = True


@contextmanager
def _failing(trial: Trial, *, alone: bool) -> Iterator[None]:
    """Let an error inside the block end the trial only, unless it is `alone`: then the error leaves the block."""
    try:
        yield
    except StoppedError:
        raise
    except SftxError as error:
        if alone:
            raise
        trial.fail(error)


def _finish(session: Session, trial: Trial) -> None:
    """Wait for the last checkpoint and call the callbacks once more."""
    session.saver.wait(trial)
    session.engine.barrier()  # every rank may read the best checkpoint
    for callback in trial.callbacks.values():
        callback.on_end(session, trial)


def _start(session: Session, trial: Trial) -> None:
    """Evaluate before the first step, and open the stream of batches at the trial's step."""
    with trial.active(session):
        if trial.step == 0 and trial.evaluates:
            _evaluate(session, trial)
        for callback in trial.callbacks.values():
            callback.on_start(session, trial)
        if trial.evaluation_due:
            _close_step(session, trial)
    trial.open_feed(session)


def _advance(session: Session, trial: Trial) -> None:
    """Make one optimizer step, then what is due after it: a record, an evaluation, a checkpoint."""
    config = trial.config
    assert trial.upcoming is not None, "the trial was started"
    started = time.perf_counter()
    with record_function(DATA):
        step = next(trial.upcoming)
    waited = time.perf_counter() - started
    for callback in trial.callbacks.values():
        callback.on_batches(session, trial, step.batches)
    launched = _launch(session, trial, step)
    if launched is None:
        return  # out of memory or interrupted: the weights are unchanged
    trial.window.waited += waited
    trial.window.add(step, _flops(session, step), time.perf_counter() - started)
    trial.tokens_seen += step.tokens
    if not _resolve(session, trial):  # the step before, if it was deferred
        return
    trial.pending = launched
    if not trial.defers_loss(session.engine) and not _resolve(session, trial):
        return
    trial.step += 1
    trial.epoch, trial.cursor = step.epoch, step.cursor
    _report_rows(session, trial, step)
    for callback in trial.callbacks.values():
        callback.on_step(session, trial)
    trial.evaluation_due = trial.evaluates_now
    record_due = trial.step == 1 or trial.due(config.logging_steps)
    if (record_due or trial.evaluation_due or trial.saves_now or session.stopping) and not _resolve(session, trial):
        return
    if record_due:
        _record(session, trial)
    _close_step(session, trial)


def _close_step(session: Session, trial: Trial) -> None:
    """Make the evaluation that is due and the checkpoint; when the run is to end, the checkpoint alone.

    A postponed evaluation saves nothing: its step's checkpoint is there, and says that the evaluation is due.
    """
    session.saver.check(trial)
    improved = trial.evaluation_due and not session.stopping and _evaluate(session, trial)
    if trial.saved_step != trial.step and (trial.saves_now or (improved and trial.config.keep_best)):
        session.saver.save(session, trial)


def _stop(session: Session, running: Sequence[Trial]) -> NoReturn:
    """Save every trial that is not at its end, and report the step of each."""
    where_trials_are = []
    for trial in running:
        with trial.active(session):
            _resolve(session, trial)
        if trial.step == 0:
            where_trials_are.append("before the first step; there was nothing to save")
            continue
        if trial.saved_step != trial.step:
            with trial.active(session):
                session.saver.save(session, trial)
        session.saver.wait(trial)
        where = checkpoint.folder_of(trial.folder.checkpoints, trial.step)
        where_trials_are.append(f"after step {trial.step} of {trial.steps.total}, saved in {where}")
    session.engine.barrier()  # torchrun kills the main rank half a minute after another has ended
    cause = session.signals.received or "a signal to another rank"
    cure = f" To continue:\n{session.resume_command}" if session.resume_command else ""
    raise StoppedError(f"{cause}: stopped " + "\n  ".join(where_trials_are) + "." + cure)


def _launch(session: Session, trial: Trial, step: Step) -> PendingStep | None:
    """Make one optimizer step, unless its loss or gradient forbids it.

    Return None if the step was not made: memory did not suffice, or a signal interrupted it between two of its
    micro-batches.
    """
    engine, config = session.engine, trial.config
    loss_sum, failed, interrupted = _gradients(session, trial, step)
    lr = config.learning_rate * trial.faults.lr_factor * trial.schedule.at(trial.step, trial.steps.total)
    number = trial.step + 1
    if trial.defers_loss(engine):
        if failed:
            shrink(session, trial, failed, [max(failed.lengths)])
            return None
        session.stopping, trial.save_due = session.signals.received is not None, trial.save_interval.due
        if interrupted:
            trial.stepper.discard()
            return None
        return PendingStep(step, number, lr, loss_sum, trial.stepper.step(lr, apply=torch.isfinite(loss_sum)))
    own = torch.zeros(3 + engine.world_size, dtype=torch.float64, device=engine.device)
    own[0], own[1] = session.signals.received is not None, engine.is_main and trial.save_interval.due
    own[2], own[3 + engine.rank] = interrupted, max(failed.lengths) if failed else 0
    summed = engine.sum(torch.cat([loss_sum.view(1), own]))
    loss_total, stop, save, partial, *too_long = summed.tolist()
    session.stopping, trial.save_due = stop > 0, save > 0
    if partial:  # on any rank: all discard the step, and the checkpoint is that of the last complete one
        trial.stepper.discard()
        return None
    if any(too_long):
        shrink(session, trial, failed, [int(tokens) for tokens in too_long])
        return None
    apply = _is_learned_from(trial, loss_total / step.weight)
    return PendingStep(step, number, lr, summed[0], trial.stepper.step(lr, apply=apply).to(engine.device))


def _is_learned_from(trial: Trial, loss: float) -> bool:
    """Return True if a step with this loss is applied."""
    return math.isfinite(loss) and not (trial.config.on_loss_spike != "warn" and trial.loss_ema.is_spike(loss))


def _resolve(session: Session, trial: Trial) -> bool:
    """Process the pending step's loss and norm; return False if the trial was rolled back."""
    pending, trial.pending = trial.pending, None
    if pending is None:
        return True
    started = time.perf_counter()
    loss_total, norm = pending.loss_and_norm()
    window, weight = trial.window, pending.step.weight
    window.seconds += time.perf_counter() - started
    loss = loss_total / weight
    fault = fault_of(trial, loss, norm)
    if fault != "nonfinite" and _is_learned_from(trial, loss):
        if fault != "overflow":
            trial.faults = replace(trial.faults, in_a_row=0, overflows_in_a_row=0)
        trial.loss_ema = trial.loss_ema.after(loss)
        window.loss += loss_total
        window.weight += weight
    trial.last_result = result = StepResult(pending.number, loss, norm, pending.learning_rate, fault)
    return not (fault and recover(session, trial, pending.step, result))


def _flops(session: Session, step: Step) -> int:
    """Return the operations that this rank's part of a step needs."""
    if session.work is None:
        return 0
    lengths = [length for batch in step.batches for length in batch.lengths]
    return session.work.flops(lengths, sum(batch.supervised_tokens for batch in step.batches))


def _gradients(session: Session, trial: Trial, step: Step) -> tuple[torch.Tensor, Batch | None, bool]:
    """Accumulate this rank's gradients of a step.

    Return the summed loss, the micro-batch that did not fit into memory, and whether a signal interrupted the step.
    """
    engine, batches = session.engine, step.batches
    stop = StopVote(engine, session.signals, len(batches))
    loss_sum = torch.zeros((), dtype=torch.float64, device=engine.device)
    for number, batch in enumerate(batches):
        _tick(session, trial)
        if stop.before(number):
            return loss_sum, None, True
        if not batch.origins and not engine.sharded:
            continue  # this rank has no rows left in a step that is smaller than the others
        _set_random_state(trial, batch.index)
        try:
            with session.numerics.autocast():
                loss = (session.loss or token_losses)(session.model, batch, engine.device).weighted_sum
            trial.stepper.backward(loss / step.weight, last=number == len(batches) - 1)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if engine.sharded:  # the others are in the middle of the same pass, and reach no sum
                shrink(session, trial, batch, [max(batch.lengths)])
            return loss_sum, batch, False
        loss_sum += loss.detach()
    return loss_sum, None, False


def _tick(session: Session, trial: Trial) -> None:
    """Show progress between two batches, when that is due."""
    if session.progress is not None:
        session.progress.tick(trial)


def _set_random_state(trial: Trial, micro_batch: int) -> None:
    """Make every draw of a micro-batch a function of (seed, step, micro-batch)."""
    trial.adapter.clock.step, trial.adapter.clock.micro_batch = trial.step, micro_batch
    torch.manual_seed(key_of(trial.config.seed, trial.step, micro_batch))  # dropout of the base, in full mode


def _report_rows(session: Session, trial: Trial, step: Step) -> None:
    """Count and write down the streamed rows that were cut or left out; log the first of each kind."""
    config = trial.config
    for kind, rows, why in (
        ("truncated", step.truncated, f"longer than max_seq_length={config.max_seq_length}: it loses its end"),
        ("left_out", step.left_out, "left out"),
    ):
        if rows and not trial.streamed[kind] and session.engine.is_main:
            log.warning("%s (%s; this one and all others: %s)", rows[0], why, trial.folder.streamed_rows)
        trial.streamed[kind] += len(rows)
        for row in rows if session.engine.is_main else ():
            record = {"step": trial.step, kind: row}
            append_line(trial.folder.streamed_rows, json.dumps(record, ensure_ascii=False))


def _record(session: Session, trial: Trial) -> None:
    """Write the mean loss since the last record, and what goes with it."""
    window, result = trial.window, trial.last_result
    assert result is not None, "the newest step is resolved before it is recorded"
    metrics = {
        "epoch": trial.epoch,
        "train/loss": window.loss / window.weight if window.weight else math.nan,
        "train/grad_norm": result.grad_norm,
        "train/learning_rate": result.learning_rate,
        "train/tokens": trial.tokens_seen,
        **window.metrics(session.engine.device, session.numerics.dtype),
    }
    faults = trial.faults
    for name, number in (("skipped_steps", faults.skipped), ("rollbacks", faults.rollbacks), ("spikes", faults.spikes)):
        if number:
            metrics[f"train/{name}"] = number
    if trial.feed.sequences is None:
        metrics |= {f"data/{kind}_rows": number for kind, number in trial.streamed.items()}
    if trial.stepper.loss_scale is not None:
        metrics["train/loss_scale"] = trial.stepper.loss_scale
    trial.recorder.log(trial.step, metrics)
    log.info(
        "step %d/%d  loss %.4f  grad norm %.3f  lr %.2e  %s tokens/s",
        trial.step, trial.steps.total, metrics["train/loss"], result.grad_norm, result.learning_rate,
        f"{metrics['perf/tokens_per_second']:,.0f}",
    )  # fmt: skip
    trial.last_window, trial.window = window, Window()


def _evaluate(session: Session, trial: Trial) -> bool:
    """Evaluate, record it, inform the schedule and the callbacks; return True if it is the best so far.

    A stop request ends the evaluation too: it is made when the run is resumed.
    """
    config = trial.config

    def stop_requested() -> bool:
        _tick(session, trial)
        return session.signals.received is not None

    result = evaluate(
        session.engine,
        session.model,
        session.numerics,
        session.eval_rows,
        token_budget=config.max_seq_length * trial.micro_batch,
        padding_free=session.padding_free,
        pad_id=session.pad_id,
        stop_requested=stop_requested,
    )
    if result is None:
        session.stopping = True
        return False
    trial.evaluation_due = False
    trial.recorder.log(trial.step, result.metrics())
    trial.first_eval = trial.first_eval or result
    trial.last_eval, trial.eval_step = result, trial.step
    finite = math.isfinite(result.loss)
    improved = finite and (trial.best_loss is None or result.loss < trial.best_loss)
    known = trial.step and finite and math.isfinite(trial.first_eval.loss)
    change = f" ({result.loss / trial.first_eval.loss - 1:+.1%} since the start)" if known else ""
    log.info("step %d/%d  eval loss %.4f%s", trial.step, trial.steps.total, result.loss, change)
    if not finite:
        log.warning(
            "step %d: the eval loss is not finite; it is never the best, and the schedule does not see it", trial.step
        )
    if trial.step == 0:
        return False
    if improved:
        trial.best_loss, trial.best_step = result.loss, trial.step
    if finite:
        trial.schedule.observe(result.loss)
    for callback in trial.callbacks.values():
        callback.on_evaluate(session, trial, result)
    return improved
