"""`sftx`: training and the commands around it. `sftx train mode=qlora`; every command: `sftx --help`.

A command is a module of `sftx.commands` with a function `add(groups)`; it is listed in COMMANDS, and
imports what is heavy only when it runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sftx import __version__
from sftx.commands import data_cache, data_check, data_convert, diff, ls, repro, train
from sftx.errors import reported

GROUPS = {"data": "look at corpora, and at what is kept of them"}
"""Words before a command's own name."""
COMMANDS = (train, data_check, data_convert, data_cache, ls, diff, repro)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line; the command chosen is its `run`."""
    top = argparse.ArgumentParser(prog="sftx", description="Supervised fine-tuning.")
    top.add_argument("--version", action="version", version=f"sftx {__version__}")
    words = top.add_subparsers(required=True, metavar="COMMAND")
    groups = {
        name: words.add_parser(name, help=text).add_subparsers(required=True, metavar="COMMAND")
        for name, text in GROUPS.items()
    }
    groups[""] = words  # for a command of one word
    for command in COMMANDS:
        command.add(groups)
    return top


def run(words: Sequence[str]) -> int:
    """Run one command and return its exit code.

    Raises:
        SftxError: what the command's own errors are.
    """
    top = parser()
    arguments, rest = top.parse_known_args(words)
    if rest and (not hasattr(arguments, "words") or any(word.startswith("-") for word in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.words += rest  # files and settings may come between options
    code: int = arguments.run(arguments)
    sys.stdout.flush()
    return code


def main() -> None:
    """Run what the command line asks for."""
    if sys.argv[1:2] == ["train"]:
        train.start(sys.argv[2:])
        return
    with reported():
        sys.exit(run(sys.argv[1:]))
