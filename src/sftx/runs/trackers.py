"""Where metrics are shown; group `tracker`."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sftx.errors import ConfigError
from sftx.secrets import scrub, scrub_text
from sftx.training.saving.metrics import Tracker


@dataclass
class TensorBoard:
    """Event files in the run folder."""

    writer: Any = field(init=False, default=None)

    def start(self, folder: Path, config: Mapping[str, Any], resume_step: int) -> Tracker:
        """Open `<folder>/tensorboard`; steps after `resume_step` of an earlier attempt are hidden."""
        from torch.utils.tensorboard import SummaryWriter

        purge_step = resume_step + 1 if resume_step else None
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step)
        return self

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write each metric as a scalar."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def finish(self) -> None:
        """Close the event file."""
        self.writer.close()


@dataclass
class Wandb:
    """Weights & Biases, online or, with WANDB_MODE=offline, in the run folder."""

    project: str
    entity: str | None
    name: str | None
    tags: list[str]
    run: Any = field(init=False, default=None)

    def start(self, folder: Path, config: Mapping[str, Any], resume_step: int) -> Tracker:
        """Start a run named after the run folder; a resumed run keeps its id.

        Raises:
            ConfigError: wandb does not start; the message says how it works without an account.
        """
        import wandb

        try:
            self.run = self._start(wandb, folder, config)
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise ConfigError(f"{reason}. Without an account or a network: WANDB_MODE=offline") from error
        return self

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log a step's metrics."""
        self.run.log(dict(metrics), step=step)

    def finish(self) -> None:
        """Wait for the upload."""
        self.run.finish()

    def _start(self, wandb: Any, folder: Path, config: Mapping[str, Any]) -> Any:
        place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
        with _redacted_argv():
            return wandb.init(
                project=scrub(self.project),
                entity=scrub(self.entity),
                name=scrub(self.name) or folder.name,
                id=f"{folder.name}-{place}",
                resume="allow",
                tags=scrub(self.tags) or None,
                config=dict(config),
                dir=str(folder),
                settings=wandb.Settings(silent=True, console="off"),
            )


@contextmanager
def _redacted_argv() -> Iterator[None]:
    """Hide the secrets of the command line, which the client of Weights & Biases reads and stores by itself."""
    typed = sys.argv
    sys.argv = [scrub_text(word) for word in typed]
    try:
        yield
    finally:
        sys.argv = typed
