"""sftx: `python train.py` with the words of `words`; the callback `Timed` measures, by sftx's own interface."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from meter import Meter

from sftx.training.callbacks import Callback

METER = Meter("peft")


@dataclass
class Timed(Callback):
    """Tells the meter of each step's rows and end, and of the losses of metrics.jsonl."""

    def on_batches(self, session: Any, trial: Any, batches: Sequence[Any]) -> None:
        """Count the rows of the step that comes."""
        for batch in batches:
            METER.batch(batch.tokens, int((batch.weights_BT > 0).sum()), batch.ids_BT.numel())

    def on_step(self, session: Any, trial: Any) -> None:
        """Take the time."""
        METER.step()

    def on_end(self, session: Any, trial: Any) -> None:
        """Read the losses."""
        records = [json.loads(line) for line in (trial.folder.path / "metrics.jsonl").open(encoding="utf-8")]
        METER.losses += [record["train/loss"] for record in records if "train/loss" in record]
