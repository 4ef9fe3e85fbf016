"""Training callbacks; group `callback`. Derive from `Callback` to write your own."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from sftx.config.bounds import Bounds
from sftx.errors import ConfigError
from sftx.files import append_line, write_text

if TYPE_CHECKING:  # imported when a callback acts, not when its settings are checked
    from sftx.data.batches.collate import Batch
    from sftx.training.measure.evaluate import Evaluation
    from sftx.training.trial import Session, Trial

log = logging.getLogger("sftx")


class Callback:
    """Called at the moments of a trial; every rank calls it. Set `trial.stop_reason` to end the trial."""

    def on_start(self, session: Session, trial: Trial) -> None:
        """Before the first step of this attempt."""

    def on_batches(self, session: Session, trial: Trial, batches: Sequence[Batch]) -> None:
        """Before the optimizer step that this rank's micro-batches make."""

    def on_step(self, session: Session, trial: Trial) -> None:
        """After an optimizer step; `trial.step` counts it."""

    def on_evaluate(self, session: Session, trial: Trial, result: Evaluation) -> None:
        """After an evaluation that followed a step."""

    def on_end(self, session: Session, trial: Trial) -> None:
        """After the last step."""

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must keep."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what `state` returned."""


@dataclass
class EarlyStopping(Callback):
    """Ends a trial whose eval loss has not fallen by `min_delta` for `patience` evaluations."""

    patience: Annotated[int, Bounds(at_least=1)]
    min_delta: Annotated[float, Bounds(at_least=0)]
    best: float = field(init=False, default=math.inf)
    waited: int = field(init=False, default=0)

    def on_evaluate(self, session: Session, trial: Trial, result: Evaluation) -> None:
        """Count evaluations without progress; one that is not finite is ignored."""
        if not math.isfinite(result.loss):
            return
        if result.loss < self.best - self.min_delta:
            self.best, self.waited = result.loss, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            trial.stop_reason = f"early stopping: no eval loss below {self.best:.4f} for {self.waited} evaluations"
            log.info("%s", trial.stop_reason)

    def state(self) -> dict[str, Any]:
        """Return the best loss and the wait."""
        return {"best": self.best, "waited": self.waited}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back the best loss and the wait."""
        self.best, self.waited = state["best"], state["waited"]


@dataclass
class GenerateSamples(Callback):
    """Writes the model's greedy answers to a few prompts after each evaluation and at the end."""

    count: Annotated[int, Bounds(at_least=1)]
    prompts: list[str]
    max_new_tokens: Annotated[int, Bounds(at_least=1)]
    last_step: int = field(init=False, default=-1)

    def on_evaluate(self, session: Session, trial: Trial, result: Evaluation) -> None:
        """Generate with the weights that were just evaluated."""
        self._generate(session, trial)

    def on_end(self, session: Session, trial: Trial) -> None:
        """Generate once more, unless the last step was evaluated."""
        if self.last_step != trial.step:
            self._generate(session, trial)

    def _generate(self, session: Session, trial: Trial) -> None:
        self.last_step = trial.step
        if not session.engine.is_main and not session.engine.sharded:
            return
        for prompt_ids in self._prompts(session):
            answer = generate(session, prompt_ids, self.max_new_tokens)
            if not session.engine.is_main:
                continue
            prompt = session.template.tokenizer.decode(prompt_ids)
            record = {"step": trial.step, "prompt": prompt, "answer": answer}
            append_line(trial.folder.path / "samples.jsonl", json.dumps(record, ensure_ascii=False))
            log.info("sample: %r -> %r", prompt[-80:], answer[:200])

    def _prompts(self, session: Session) -> list[list[int]]:
        if self.prompts:
            thinking = session.template.thinking_of(session.rows)
            prompts = [[{"role": "user", "content": p}] for p in self.prompts]
            return [session.template.prompt_ids(messages, thinking=thinking) for messages in prompts]
        rows = session.eval_rows or session.rows
        return [r.ids_T[: int(r.supervised_T.argmax())].tolist() for r in rows[: self.count]]


def generate(session: Session, prompt_ids: list[int], max_new_tokens: int) -> str:
    """Return the active adapter's greedy answer to a prompt, without control tokens, up to the model's positions."""
    import torch

    from sftx.model.loading.limits import positions_of

    module = session.model.module
    if (positions := positions_of(module)) is not None:
        max_new_tokens = min(max_new_tokens, positions - len(prompt_ids))
        if max_new_tokens < 1:
            return f"(none: the prompt has {len(prompt_ids)} tokens, the model {positions} positions)"
    module.eval()
    ids_BT = torch.tensor([prompt_ids], device=session.engine.device)
    with torch.no_grad(), session.numerics.autocast():
        out_BT = module.generate(
            input_ids=ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=session.template.stop_ids(),
            pad_token_id=session.pad_id,
        )
    module.train()
    return session.template.tokenizer.decode(out_BT[0, len(prompt_ids) :], skip_special_tokens=True)


@dataclass
class LogBatches(Callback):
    """Writes a hash of each micro-batch to `batches.jsonl`, so that two runs can be compared."""

    def on_batches(self, session: Session, trial: Trial, batches: Sequence[Batch]) -> None:
        """Write a line for each micro-batch of this rank."""
        rank = session.engine.rank
        name = "batches.jsonl" if session.engine.world_size == 1 else f"batches-rank{rank}.jsonl"
        for batch in batches:
            record = {
                "step": trial.step + 1,
                "micro_batch": batch.index,
                "rows": list(batch.origins),
                "tokens": batch.tokens,
                "sha256": batch.digest(),
            }
            append_line(trial.folder.path / name, json.dumps(record, ensure_ascii=False))


@dataclass
class Profile(Callback):
    """Traces `steps` steps from `first_step` on with torch's profiler, and measures MFU over the steps after them."""

    first_step: Annotated[int, Bounds(at_least=1)]
    steps: Annotated[int, Bounds(at_least=1)]
    profiler: Any = field(init=False, default=None)
    shares: dict[str, float] = field(init=False, default_factory=dict)

    def on_start(self, session: Session, trial: Trial) -> None:
        """Check that the run is long enough."""
        if trial.steps.total < self.first_step + self.steps:
            raise ConfigError(
                f"`callback.profile`: the run has {trial.steps.total} steps, but steps {self.first_step} to "
                f"{self.first_step + self.steps - 1} are to be traced. Set a larger max_steps."
            )

    def on_step(self, session: Session, trial: Trial) -> None:
        """Start and stop the profiler."""
        import torch

        from sftx.training.measure.profile import parts_of

        if trial.step == self.first_step - 1 or (self.first_step <= 1 and trial.step == 1):
            self.profiler = torch.profiler.profile(record_shapes=True)
            self.profiler.start()
        elif self.profiler is not None and trial.step == self.first_step + self.steps - 1:
            self.profiler.stop()
            self.shares = parts_of(self.profiler.events())
            if session.engine.is_main:
                self._write_trace(trial)
            self.profiler = None

    def on_end(self, session: Session, trial: Trial) -> None:
        """Write what the time went to."""
        from sftx.training.measure.profile import report_of, table_of

        if session.engine.is_main and self.shares:
            report = report_of(self.shares, session, trial)
            write_text(trial.folder.path / "profile" / "summary.json", json.dumps(report, indent=1) + "\n")
            text = table_of(report)
            write_text(trial.folder.path / "profile" / "summary.txt", text)
            log.info("%s", text)
            log.info("profile: %s", trial.folder.path / "profile")

    def _write_trace(self, trial: Trial) -> None:
        import torch

        folder = trial.folder.path / "profile"
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        write_text(folder / "table.txt", self.profiler.key_averages().table(sort_by=by, row_limit=40))
        self.profiler.export_chrome_trace(str(folder / "trace.json"))
