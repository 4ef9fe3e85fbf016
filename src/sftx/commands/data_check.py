"""`sftx data check`: what a run would make of some files, without training."""

from __future__ import annotations

import argparse
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftx.errors import ConfigError, DataError
from sftx.terminal import visible_json

if TYPE_CHECKING:
    from sftx.commands.data_report import Checked


def add(groups: dict[str, argparse._SubParsersAction[argparse.ArgumentParser]]) -> None:
    """Add `data check`."""
    parser = groups["data"].add_parser(
        "check",
        help="read files as training would, and say what is in them",
        description="Read files as training would, and say what is in them. Settings are typed as for `sftx train`, "
        "for example model_name_or_path=models/smollm2-135m max_seq_length=512 data.on_bad_rows=skip. "
        "The exit code is 2 when something would be refused.",
    )
    parser.add_argument("words", nargs="+", metavar="FILE|key=value", help="files, folders or patterns; settings")
    parser.add_argument("--eval", action="append", default=[], metavar="FILE", help="held-out files, to look for leaks")
    parser.add_argument("--show", type=int, default=2, metavar="N", help="rows to show as they are trained on (2)")
    parser.add_argument(
        "--near", type=float, metavar="THRESHOLD", help="report near-duplicates with similarity >= THRESHOLD"
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the distribution of lengths (needs matplotlib)")
    parser.add_argument("--json", action="store_true", help="print all findings as JSON")
    parser.set_defaults(run=_check)


def _check(asked: argparse.Namespace) -> int:
    files, settings = sort_words(asked.words)
    if asked.png and find_spec("matplotlib") is None:
        raise ConfigError("--png needs matplotlib, which is not installed: pip install matplotlib")
    from sftx.config.checks.check import freeze
    from sftx.config.composition.prepare import compose_checked

    config = freeze(compose_checked(settings))
    from sftx.commands import data_report

    with redirect_stdout(sys.stderr):  # libraries print when they are imported: the answer alone goes to stdout
        checked = data_report.check(files, asked.eval, config, near=asked.near)
        if asked.png:
            data_report.draw(checked, asked.png)
    if asked.json:
        print(visible_json(_as_json(checked)))
    else:
        data_report.show(checked, rows=asked.show, terminal=sys.stdout)
    sys.stdout.flush()
    if checked.refused:
        raise DataError(f"a run would be refused: {checked.refused}")
    return 0


def sort_words(words: list[str]) -> tuple[list[str], list[str]]:
    """Sort words into files and settings; a word that is a file is one, whatever it looks like.

    Raises:
        DataError: no file is named.
    """
    settings = [w for w in words if "=" in w and not Path(w).exists()]
    files = [w for w in words if w not in settings]
    for key in ("train_file_path", "train_file_name", "eval_file_name"):
        if any(s.startswith(f"{key}=") for s in settings):
            raise ConfigError(
                f"command line: `{key}`: name the files themselves: sftx data check FILE ... [--eval FILE]"
            )
    if not files:
        raise DataError("sftx data check: name at least one file, for example data/aspcoder_train.csv.")
    return files, settings


def _as_json(checked: Checked) -> dict[str, Any]:
    return {
        "files": list(checked.loaded.files),
        "template": checked.template.origin,
        "refused": checked.refused,
        "epoch": asdict(checked.epoch) if checked.epoch else None,
        "left_out": checked.left_out,
    } | checked.audit.as_dict()
