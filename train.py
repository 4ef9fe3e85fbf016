"""Fine-tune a model: `python train.py mode=qlora lora_rank=32`; every key: `python train.py --help`.

Check the command line, let Hydra compose it, freeze it, run it. Nothing heavy is imported before the
configuration is right.
"""

from __future__ import annotations

import gc
import os
import sys
from contextlib import suppress

from sftx.errors import reported
from sftx.parallel.signals import Signals


def main() -> None:
    """Run what the command line asks for."""
    from sftx.config import by_hydra
    from sftx.config.compose import prepare
    from sftx.config.help import asks_for_help, help_text

    if asks_for_help(sys.argv[1:]):
        print(help_text(), flush=True)
        return
    request = prepare(sys.argv[1:])
    if request.shown is not None:
        print(request.shown, end="", flush=True)
        return

    from omegaconf import DictConfig

    from sftx.runs import trials

    failures: list[Exception] = []

    def job(composed: DictConfig) -> float | None:
        try:
            return trials.run_job(composed, request)
        except Exception as error:
            failures.append(error)  # raised again below, where Hydra adds nothing to its message
            if request.multirun:
                raise  # so that a launcher or a sweeper knows
            return None

    sys.argv[1:] = request.argv
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to `reported`, not to Hydra's printer
    if request.multirun:
        with suppress(trials.TrialFailed):
            by_hydra.run(job)
        sys.exit(trials.end_of_sweep())
    by_hydra.run(job, request.composed)
    if failures:
        raise failures[0]


if __name__ == "__main__":
    gc.disable()  # until training begins: importing and composing make many objects and little garbage
    with reported(), Signals(whole_program=True):
        main()
