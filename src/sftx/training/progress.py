"""The progress bar, with the time left."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType

from tqdm import tqdm

from sftx.training.trial import Session, Trial


class Progress:
    """A bar over the steps of all trials; none with `disable_tqdm` or when output is no terminal."""

    def __init__(self, session: Session, trials: Sequence[Trial]) -> None:
        hidden = trials[0].config.disable_tqdm or not sys.stderr.isatty() or not session.engine.is_main
        self.bar = tqdm(
            total=sum(t.steps.total for t in trials),
            initial=sum(t.step for t in trials),
            disable=hidden,
            unit="step",
            dynamic_ncols=True,
        )

    def update(self, trial: Trial) -> None:
        """Count one step."""
        self.bar.update()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()
