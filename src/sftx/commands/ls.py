"""`sftx ls`: the runs in a folder."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from sftx.errors import RunFolderError

if TYPE_CHECKING:
    from sftx.runs.saved.listing import ListedRun

TITLES = ("state", "best loss", "started", "run", "command")


def add(groups: dict[str, argparse._SubParsersAction[argparse.ArgumentParser]]) -> None:
    """Add `ls`."""
    parser = groups[""].add_parser(
        "ls",
        help="list runs: state, best eval loss, command",
        description="List the runs below a folder, newest first, the trials of sweeps included: state, lowest eval "
        "loss, start, folder, and the command (for a finished trial its overrides).",
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("outputs"), help="default: outputs")
    parser.add_argument("--json", action="store_true", help="print all as JSON")
    parser.set_defaults(run=_ls)


def _ls(arguments: argparse.Namespace) -> int:
    from sftx.runs.saved.listing import list_runs

    if not arguments.folder.is_dir():
        raise RunFolderError(f"{arguments.folder}: no such folder. Name the folder that holds the runs: sftx ls FOLDER")
    runs = list_runs(arguments.folder)
    if arguments.json:
        plain = [asdict(run) | {"path": str(run.path)} for run in runs]
        print(json.dumps(plain, ensure_ascii=True, indent=2))
    elif runs:
        print("\n".join(_lines(runs)))
    else:
        print(f"{arguments.folder}: no runs", file=sys.stderr)
    return 0


def _lines(runs: Sequence[ListedRun]) -> list[str]:
    """Return a table; the last column is as wide as it is, for `grep` and `less -S`."""
    from sftx.terminal import columns, visible

    rows: list[tuple[str, ...]] = [TITLES]
    for run in runs:
        loss = "-" if run.best_loss is None else f"{run.best_loss:.4f}"
        cells = (run.state, loss, run.started[:16].replace("T", " ") or "-", str(run.path), run.command)
        rows.append(tuple(map(visible, cells)))
    return columns(rows)
