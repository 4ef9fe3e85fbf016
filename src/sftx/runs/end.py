"""The end of a trial: `final/`, the model card, the result, and what to type next."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import suppress

from sftx import INSTALLED, train_command
from sftx.errors import CheckpointError, SftxError
from sftx.files import write_text
from sftx.logs import ONLY_TO_FILE, log_context
from sftx.model.export.final import save_final
from sftx.model.export.weights import read_weights
from sftx.parallel.engine import Engine
from sftx.runs.card import model_card
from sftx.runs.result import Result
from sftx.terminal import counted
from sftx.training.saving import checkpoint
from sftx.training.trial import Session, Trial

log = logging.getLogger("sftx")
SMOLLM2 = "python -m sftx.model.loading.smollm2 models/smollm2-135m" if INSTALLED else "make smollm2"
"""The command that fetches a small real model."""


def finish_trial(trial: Trial, session: Session) -> Result:
    """Publish `final/`, the model card and the result of the active trial."""
    config = trial.config
    final_loss = trial.last_eval.loss if trial.last_eval else None
    chosen = trial.step
    if config.keep_best and trial.best_step is not None:
        best = checkpoint.folder_of(trial.folder.checkpoints, trial.best_step)
        if problem := checkpoint.problem_of(best):
            raise CheckpointError(
                f"{best}: {problem}. It was the best state, for final/. Put it back from a copy, or take the last "
                "state instead: keep_best=false."
            )
        trial.stepper.load_weights(read_weights(session.model, trial.adapter, best))
        chosen, final_loss = trial.best_step, trial.best_loss
    before = trial.first_eval.loss if trial.first_eval else None
    result = Result(trial.folder.path, trial.step, before, final_loss, trial.stop_reason)
    weights = trial.stepper.weights()
    checkpoint.check_finite(chosen, weights)
    if session.engine.is_main:
        final = trial.folder.final
        save_final(
            session.model, trial.adapter, weights, session.template, final, session.base_folder, config.final_dtype
        )
        facts = {
            "steps": result.steps,
            "final_step": chosen,
            "eval_loss_before": before,
            "eval_loss": final_loss,
            "stop_reason": trial.stop_reason,
            "skipped_steps": trial.faults.skipped,
            "rollbacks": trial.faults.rollbacks,
            "loss_spikes": trial.faults.spikes,
        }
        thinking = session.template.thinking_of(session.rows)
        switch = "" if thinking is None else f"{session.template.thinking_switch}={thinking}"
        card = model_card(config, trial.folder.manifest | {"result": facts}, final, switch=switch)
        write_text(trial.folder.path / "README.md", card)
        trial.folder.update(status="completed", result=facts)  # last: a completed run is not opened again
        log.info("%s", _closing(trial, result, chosen))
    session.engine.barrier()
    return result


def _closing(trial: Trial, result: Result, chosen: int) -> str:
    """Say where everything is and what to type next."""
    lines = ["", f"Done: {counted(result.steps, 'step')}."]
    if result.eval_loss is not None and result.eval_loss_before is not None:
        change = result.eval_loss / result.eval_loss_before - 1
        share = f" ({change:+.1%})" if math.isfinite(change) else ""
        lines[-1] += f" Eval loss {result.eval_loss_before:.4f} -> {result.eval_loss:.4f}{share}."
    faults = trial.faults
    if faults.skipped or faults.rollbacks:
        lines.append(f"Steps skipped: {faults.skipped}, rollbacks: {faults.rollbacks} (see train.log).")
    if chosen != result.steps:
        lines.append(f"final/ holds the best state, step {chosen}.")
    kind = "model" if trial.config.train_mode == "full" else "adapter"
    lines += [
        f"  {trial.folder.final}/  the {kind}, with its tokenizer",
        f"  {trial.folder.path}/  README.md (how to use it), config.yaml, manifest.json, metrics.jsonl, train.log",
    ]
    if "tensorboard" in trial.config.tracker:
        lines.append(f"See the curves:  tensorboard --logdir {trial.folder.path}")
    if trial.config.model_name_or_path == "qwen-tiny":
        lines += [
            f"Next:            {SMOLLM2} && {train_command()} model=smollm2 mode=qlora lora_rank=32   (a real model)",
            f"                 {train_command()} train_file_path=<folder> train_file_name=<your.csv>     (your data)",
        ]
    return "\n".join(lines)


def note_failure(trials: Sequence[Trial], engine: Engine, error: BaseException, *, stopped: bool) -> None:
    """Note in the manifest of each trial that has not ended that it failed, or that a signal stopped it."""
    if not engine.is_main:
        return
    status = "stopped" if stopped else "failed"
    for trial in trials:
        if trial.folder.manifest and not trial.ended:
            with suppress(SftxError):  # a disk that ended the run may refuse this too: its first refusal is reported
                trial.folder.update(status=status, error=f"{type(error).__name__}: {error}")
            first_line = (str(error) or type(error).__name__).splitlines()[0]
            with log_context(trial.name):
                if trial.error is None:
                    log.error("%s: %s", status, first_line, extra=ONLY_TO_FILE)  # the terminal gets the error itself
                else:
                    log.error("failed: %s (the other trials go on)", error)
