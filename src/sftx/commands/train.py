"""`sftx train`, and `python train.py` in a checkout: check the command line, compose, freeze, run.

Nothing heavy is imported before the configuration is right.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from sftx.errors import reported
from sftx.signals import Signals


def add(groups: dict[str, argparse._SubParsersAction[argparse.ArgumentParser]]) -> None:
    """List `train`; its words are Hydra's and never reach argparse (see `sftx.cli.main`)."""
    groups[""].add_parser("train", help="train a model: sftx train mode=qlora lora_rank=32; keys: sftx train --help")


def start(words: Sequence[str]) -> None:
    """Run what the command line asks for as the whole program: with its signals, exit codes and messages."""
    gc.disable()  # until training begins: imports make many objects and no garbage (a tenth of the CPU time of a start)
    with reported(), Signals(whole_program=True):
        main(words)


def main(words: Sequence[str]) -> None:
    """Run what the command line asks for.

    Raises:
        SftxError: what the user can fix.
    """
    from sftx.config.composition import by_hydra
    from sftx.config.composition.prepare import prepare
    from sftx.config.help.text import asks_for_help, help_text

    if asks_for_help(words):
        print(help_text(), flush=True)
        return
    if any(word.startswith("allow_targets=") for word in words) and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # the user's modules; last, so that no file here replaces an installed module
    request = prepare(list(words))
    if request.shown is not None:
        print(request.shown, end="", flush=True)
        return

    from omegaconf import DictConfig

    from sftx.runs import trials

    if request.composed is not None:
        by_hydra.run_once(lambda composed: trials.run_job(composed, request), *request.composed)
        return
    failures: list[Exception] = []

    def job(composed: DictConfig) -> float | None:
        try:
            return trials.run_job(composed, request)
        except Exception as error:
            failures.append(error)  # raised again below, where Hydra adds nothing to its message
            if request.multirun:
                raise  # so that a launcher or a sweeper knows
            return None

    if any(word.split("=")[0] in ("--info", "-i") for word in words):
        logging.raiseExceptions = False  # Hydra logs what it shows, and `| head` ends that early
    sys.argv[1:] = request.argv
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach `reported`, not Hydra's printer
    if request.multirun:
        with suppress(trials.TrialFailed):
            by_hydra.run_by_hydra(job)
        sys.exit(trials.end_of_sweep())
    by_hydra.run_by_hydra(job)
    if failures:
        raise failures[0]
