"""Measures a trainer from inside its process; every trainer is measured at the same places.

The loop starts when the first micro-batch is about to be computed, a step ends with torch's `optimizer.step()`, and
CPU-seconds are those of the process and of the children that it has waited for. The result is written as JSON when the
process ends, so that its peak memory is that of the whole run.
"""

from __future__ import annotations

import atexit
import functools
import importlib.metadata
import json
import os
import resource
import time
from pathlib import Path
from typing import Any


class Meter:
    """Counts tokens and takes the time."""

    def __init__(self, *packages: str) -> None:
        self.started = float(os.environ["PEERS_STARTED"])
        self.loop: dict[str, float] | None = None
        self.steps: list[dict[str, float]] = []
        self.losses: list[float] = []
        self.count = {"tokens": 0, "supervised": 0, "slots": 0}
        self.packages = packages
        atexit.register(self.write)

    def now(self) -> dict[str, float]:
        """Return seconds and CPU-seconds since the process was started."""
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        cpu = sum(u.ru_utime + u.ru_stime for u in used)
        return {"wall": time.time() - self.started, "cpu": cpu}

    def batch(self, tokens: int, supervised: int, slots: int) -> None:
        """Count a micro-batch that is about to be computed; `slots` counts padding too."""
        self.loop = self.loop or self.now()
        for name, number in zip(self.count, (tokens, supervised, slots), strict=True):
            self.count[name] += number

    def step(self) -> None:
        """Take the time at the end of an optimizer step."""
        self.steps.append(self.now() | self.count)

    def watch_optimizers(self) -> None:
        """Call `step` after every step of any optimizer of torch."""
        from torch.optim.optimizer import register_optimizer_step_post_hook

        register_optimizer_step_post_hook(lambda *_: self.step())

    def watch_trainer(self) -> None:
        """Count the micro-batches and losses of transformers' Trainer, whatever is derived from it."""
        import transformers

        meter, trainer = self, transformers.Trainer
        training_step, construct = trainer.training_step, trainer.__init__

        class Losses(transformers.TrainerCallback):
            def on_log(self, *_: Any, logs: dict[str, Any] | None = None, **__: Any) -> None:
                if "loss" in (logs or {}):
                    meter.losses.append(float(logs["loss"]))

        @functools.wraps(training_step)
        def counted(self: Any, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            ids, labels = inputs["input_ids"], inputs["labels"]
            pad = getattr(self.processing_class, "pad_token_id", None)
            supervised = int((labels[..., 1:] != -100).sum())
            meter.batch(int((ids != pad).sum()) if pad is not None else ids.numel(), supervised, ids.numel())
            return training_step(self, model, inputs, *rest, **named)

        @functools.wraps(construct)
        def constructed(self: Any, *rest: Any, **named: Any) -> None:
            construct(self, *rest, **named)
            self.add_callback(Losses())

        trainer.training_step, trainer.__init__ = counted, constructed
        self.watch_optimizers()

    def write(self) -> None:
        """Write what was measured."""
        versions = {name: _version(name) for name in ("torch", "transformers", *self.packages)}
        found = {"versions": versions, "peak_rss_mb": _peak_mb(), **figures(self.loop, self.steps, self.losses)}
        Path(os.environ["PEERS_OUT"]).write_text(json.dumps(found), encoding="utf-8")


def figures(
    loop: dict[str, float] | None, steps: list[dict[str, float]], losses: list[float]
) -> dict[str, float | int | None]:
    """Return the figures of a run from its times and counts.

    `rate_*`: tokens a second over the whole loop; `later_*`: over the steps after the first. `loss_mean` weighs each
    step by its supervised tokens: with a learning rate of 0 it is the loss of the rows, in whatever order.
    """
    if loop is None or not steps:
        return {"steps": 0}
    first, last = steps[0], steps[-1]
    found: dict[str, float | int | None] = {"steps": len(steps)}
    found |= {name: int(last[name]) for name in ("tokens", "supervised", "slots")}
    for kind in ("cpu", "wall"):
        found[f"start_{kind}_s"] = round(loop[kind], 2)
        found[f"first_step_{kind}_s"] = round(first[kind], 2)
        found[f"loop_{kind}_s"] = round(last[kind] - loop[kind], 3)
        for tokens in ("tokens", "supervised"):
            found[f"rate_{tokens}_{kind}"] = _rate(last[tokens], last[kind] - loop[kind])
            found[f"later_{tokens}_{kind}"] = _rate(last[tokens] - first[tokens], last[kind] - first[kind])
    if losses:
        counts = [step["supervised"] for step in steps]
        weights = [after - before for before, after in zip([0, *counts], counts, strict=False)]
        whole = len(losses) == len(steps)
        found["loss_first"] = losses[0]
        found["loss_mean"] = sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights) if whole else None
    return found


def read_spec() -> dict[str, Any]:
    """Return what the parent asks of this run."""
    spec: dict[str, Any] = json.loads(Path(os.environ["PEERS_SPEC"]).read_text(encoding="utf-8"))
    return spec


def _rate(tokens: float, seconds: float) -> float | None:
    return round(tokens / seconds, 1) if seconds > 0 and tokens > 0 else None


def _peak_mb() -> int:
    """Return the most memory this process has had; unlike `ru_maxrss`, without that of the one which started it."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) // 1024


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
