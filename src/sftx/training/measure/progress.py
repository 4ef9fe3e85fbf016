"""The progress bar, with the time left; off a terminal, a line at least every minute."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from types import TracebackType

from tqdm import tqdm

from sftx.training.trial import Session, Trial

log = logging.getLogger("sftx")
clock = time.monotonic
SECONDS = 60.0
"""Between two lines."""


class Progress:
    """A bar over the steps of all trials; lines instead with `disable_tqdm` or when output is no terminal."""

    def __init__(self, session: Session, trials: Sequence[Trial]) -> None:
        hidden = trials[0].config.disable_tqdm or not sys.stderr.isatty() or not session.engine.is_main
        self.bar = tqdm(
            total=sum(t.steps.total for t in trials),
            initial=sum(t.step for t in trials),
            disable=hidden,
            unit="step",
            dynamic_ncols=True,
        )
        self._trials = trials
        self._prints = hidden and session.engine.is_main
        self._first = self._last = (clock(), self._steps, self._tokens)

    @property
    def _steps(self) -> int:
        return sum(t.step for t in self._trials)

    @property
    def _tokens(self) -> int:
        return sum(t.tokens_seen for t in self._trials)

    def update(self, trial: Trial) -> None:
        """Count one step."""
        self.bar.update()
        self.tick(trial)

    def tick(self, trial: Trial) -> None:
        """Print a line if the last one is a minute old; called between micro-batches, and never waits for a device."""
        if not self._prints or (now := clock()) - self._last[0] < SECONDS:
            return
        steps, tokens = self._steps, self._tokens
        parts = [f"step {trial.step}/{trial.steps.total}"]
        if trial.last_result is not None:
            parts.append(f"loss {trial.last_result.loss:.4f}")
        if tokens > self._last[2]:
            parts.append(f"{(tokens - self._last[2]) / (now - self._last[0]):,.0f} tokens/s")
        if steps > self._first[1]:
            a_step = (now - self._first[0]) / (steps - self._first[1])
            parts.append(f"{_duration(a_step * (sum(t.steps.total for t in self._trials) - steps))} left")
        self._last = (now, steps, tokens)
        log.info("%s", "  ".join(parts))

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()


def _duration(seconds: float) -> str:
    """Write 4320 seconds as `1 h 12 min`."""
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min" if minutes else f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60} min"
