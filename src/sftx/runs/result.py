"""What a trial came to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Result:
    """What a trial came to."""

    output_dir: Path
    steps: int
    eval_loss_before: float | None
    eval_loss: float | None
    stop_reason: str | None

    @property
    def objective(self) -> float | None:
        """What a sweep minimises."""
        return self.eval_loss
