"""`python changed_rank.py WHAT WORD...`: train.py with one thing changed, for ranks in processes of their own."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch
import train

from sftx.errors import reported
from sftx.signals import Signals
from sftx.training import loop, recovery
from sftx.training.loss import TokenLosses
from sftx.training.precision import Numerics, Precision


def bf16() -> None:
    """Compute in bf16 on a CPU."""
    Precision.resolve = lambda self, device, *_, **__: Numerics(torch.bfloat16, device)  # type: ignore[method-assign]


def spike() -> None:
    """Let the loss of step 4 stand far out."""
    recovery.EMA_WARMUP_STEPS, recovery.LEAST_RISE = 2, 1.0
    _at_step(4, lambda found, _: found._replace(weighted_sum=found.weighted_sum * 50))


def stop() -> None:
    """Ask one rank to end after the first of step 3's micro-batches."""

    def ask(found: TokenLosses, micro_batch: int) -> TokenLosses:
        if micro_batch == 1 and os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    _at_step(3, ask)


def _at_step(number: int, change: Callable[[TokenLosses, int], TokenLosses]) -> None:
    """Change the losses of a step's micro-batches, which are counted from 1."""
    launch, token_losses = loop._launch, loop.token_losses
    step = calls = 0

    def noted(session: Any, trial: Any, made: Any) -> Any:
        nonlocal step, calls
        step, calls = trial.step + 1, 0
        return launch(session, trial, made)

    def changed(*arguments: Any) -> TokenLosses:
        nonlocal calls
        calls += 1
        found = token_losses(*arguments)
        return change(found, calls) if step == number else found

    loop._launch, loop.token_losses = noted, changed


if __name__ == "__main__":
    {"bf16": bf16, "spike": spike, "stop": stop}[sys.argv.pop(1)]()
    with reported(), Signals(whole_program=True):
        train.main(sys.argv[1:])
