"""A trial: one adapter in training, with everything that is its own.

A plain run is a list of one trial. Trials that share a frozen base are a longer list: each has its
own optimizer, schedule, loss scaler, clipping, data order, metrics and run folder.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftx.config.derive import Steps, largest_divisor, sequences_per_device
from sftx.config.schema import TrainConfig
from sftx.data.batches.feed import Feed, Layout, Step
from sftx.data.encode.template import ChatTemplate
from sftx.data.store.rows import Rows
from sftx.effective import Effective
from sftx.errors import SftxError
from sftx.logs import log_context
from sftx.model.adapt import AdaptedModel, Adapter
from sftx.parallel.engine import Engine
from sftx.parallel.stepper import Stepper
from sftx.signals import Signals
from sftx.training.loss import LossFunction
from sftx.training.measure.evaluate import Evaluation
from sftx.training.measure.flops import Work
from sftx.training.measure.perf import Window
from sftx.training.pending import PendingStep
from sftx.training.precision import Numerics
from sftx.training.recovery import Faults, LossEma, StepResult
from sftx.training.saving.metrics import Recorder, SilentRecorder
from sftx.training.saving.run_folder import RunFolder
from sftx.training.saving.saver import SaveInterval, Saver
from sftx.training.schedulers import Schedule

if TYPE_CHECKING:
    from sftx.training.measure.progress import Progress


@dataclass
class Session:
    """What the trials of one call share: the machine, the base, the data."""

    engine: Engine
    model: AdaptedModel
    numerics: Numerics
    template: ChatTemplate
    rows: Rows
    """Those that are trained on; of a corpus that is streamed, the first ones."""
    eval_rows: Rows
    base_folder: Path
    saver: Saver
    signals: Signals
    padding_free: bool = False
    """Rows are concatenated instead of padded."""
    loss: LossFunction | None = None
    """What is trained on, None: the cross entropy. Evaluation reports the cross entropy in any case."""
    progress: Progress | None = None
    """Shows how far the trials are, while they train."""
    resume_command: str = ""
    """Continues the run when it is pasted; empty where that is not known."""
    work: Work | None = None
    """What the model does for a token; None where it cannot be counted."""

    @property
    def pad_id(self) -> int:
        """The token that fills the right of a batch."""
        return int(self.template.tokenizer.pad_token_id)

    stopping: bool = False
    """Some rank was stopped, and all know it."""

    def layout(self, micro_batch: int) -> Layout:
        """Return how rows become this rank's tensors."""
        return Layout(self.padding_free, self.pad_id, self.engine.rank, self.engine.world_size, micro_batch)


@dataclass
class Trial:
    """One adapter in training."""

    name: str
    config: TrainConfig
    adapter: Adapter
    feed: Feed
    steps: Steps
    stepper: Stepper
    schedule: Schedule
    callbacks: dict[str, Any]
    folder: RunFolder
    recorder: Recorder
    effective: Effective
    save_interval: SaveInterval
    micro_batch: int
    """Sequences of a device's micro-batch; `auto` halves it."""
    step: int = 0
    """Optimizer steps made."""
    tokens_seen: int = 0
    epoch: float = 0.0
    """Passes over the corpus that were made."""
    cursor: dict[str, Any] | None = None
    """Where the feed continues, if it needs to know."""
    streamed: dict[str, int] = field(default_factory=lambda: {"truncated": 0, "left_out": 0})
    """Rows that lost tokens and records that gave no row, found while training."""
    window: Window = field(default_factory=Window)
    last_window: Window | None = None
    """The one that was last recorded."""
    best_loss: float | None = None
    best_step: int | None = None
    first_eval: Evaluation | None = None
    last_eval: Evaluation | None = None
    eval_step: int = -1
    evaluation_due: bool = False
    """The present step's evaluation was postponed: the run was stopped."""
    saved_step: int = -1
    """The step whose checkpoint is in this run's folder and holds the trial's present state."""
    faults: Faults = field(default_factory=Faults)
    save_due: bool = False
    """`save_interval` is over on the main rank, and all ranks know it."""
    loss_ema: LossEma = field(default_factory=LossEma)
    pending: PendingStep | None = None
    """The newest step, while its loss was not read."""
    last_result: StepResult | None = None
    """Of the newest step whose loss was read."""
    stop_reason: str | None = None
    error: SftxError | None = None
    """Why the trial failed, if it did."""
    ended: bool = False
    """Its result, or its failure, is in its folder."""
    upcoming: Generator[Step] | None = None
    """The steps that are still to be made."""

    @contextmanager
    def active(self, session: Session) -> Iterator[None]:
        """Let this trial's adapter be the active one inside the block, and the messages its own."""
        with session.model.using(self.adapter.name), log_context(self.name):
            yield

    def open_feed(self, session: Session) -> None:
        """Open the stream of steps at the trial's present step."""
        if self.upcoming is not None:
            self.upcoming.close()
        self.upcoming = self.feed.steps(self.step, self.steps.total, self.cursor, session.layout(self.micro_batch))

    def fail(self, error: SftxError) -> None:
        """End the trial with an error, while others continue."""
        self.error, self.pending = error, None
        self.stepper.discard()

    def close(self) -> None:
        """Let go of all that outlives the trial: loader processes, trackers, the run folder."""
        if self.upcoming is not None:
            self.upcoming.close()
        self.recorder.finish()
        self.recorder = SilentRecorder()
        self.folder.unlock()

    def defers_loss(self, engine: Engine) -> bool:
        """Return True if a step's loss may be read after the next step was launched: nothing depends on it."""
        return engine.defers_loss and self.stepper.masks and self.config.on_loss_spike == "warn"

    @property
    def finished(self) -> bool:
        """True when no further step is to be made."""
        return self.stop_reason is not None or self.step >= self.steps.total

    @property
    def evaluates(self) -> bool:
        """True when there is something to evaluate on."""
        return self.config.eval_ratio > 0 or self.config.eval_file_name is not None

    def due(self, every: int) -> bool:
        """True when something that happens every so many steps happens after the present step."""
        return self.step % every == 0 or self.finished

    @property
    def saves_now(self) -> bool:
        """True when a checkpoint follows the present step."""
        match self.config.save_strategy:
            case "no":
                return False
            case "epoch":
                return self.finished or (self.steps.per_epoch is not None and self.step % self.steps.per_epoch == 0)
        if self.config.save_steps == "auto":
            return self.finished or self.save_due
        return self.due(self.config.save_steps)

    @property
    def evaluates_now(self) -> bool:
        """True when an evaluation follows the present step; `auto` is ten times in the run."""
        every = self.config.eval_steps
        return self.evaluates and self.due(-(-self.steps.total // 10) if every == "auto" else every)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must keep besides weights and optimizer."""
        return {
            "step": self.step,
            "total": self.steps.total,
            "tokens_seen": self.tokens_seen,
            "epoch": self.epoch,
            "cursor": self.cursor,
            "streamed": self.streamed,
            "window": self.window.__dict__,
            "evaluation_due": self.evaluation_due,
            "faults": asdict(self.faults),
            "micro_batch": self.micro_batch,
            "loss_ema": asdict(self.loss_ema),
            "best_loss": self.best_loss,
            "best_step": self.best_step,
            "stop_reason": self.stop_reason,
            "eval_loss_before": self.first_eval.loss if self.first_eval else None,
            "eval_loss": self.last_eval.loss if self.last_eval and self.eval_step == self.step else None,
            "schedule": self.schedule.state(),
            "callbacks": {n: c.state() for n, c in self.callbacks.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what `state` returned."""
        self.step = state["step"]
        self.tokens_seen, self.epoch, self.cursor = state["tokens_seen"], state["epoch"], state["cursor"]
        self.streamed, self.evaluation_due = state["streamed"], state["evaluation_due"]
        self.faults = Faults(**state["faults"])
        self.window = Window(**state["window"])
        if self.config.per_device_train_batch_size == "auto":  # a smaller one, found since, stays
            self.micro_batch = largest_divisor(
                sequences_per_device(self.config), min(self.micro_batch, state["micro_batch"])
            )
        self.loss_ema = LossEma(**state["loss_ema"])
        self.best_loss, self.best_step = state["best_loss"], state["best_step"]
        if state["eval_loss_before"] is not None:
            self.first_eval = Evaluation(state["eval_loss_before"], {}, 0, 0.0)
        if state["eval_loss"] is not None:
            self.last_eval, self.eval_step = Evaluation(state["eval_loss"], {}, 0, 0.0), self.step
        self.schedule.restore(state["schedule"])
        for name, callback in self.callbacks.items():
            if name in state["callbacks"]:
                callback.restore(state["callbacks"][name])
