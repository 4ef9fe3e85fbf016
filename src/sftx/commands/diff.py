"""`sftx diff A B`: how two runs differ."""

from __future__ import annotations

import argparse
import json
from itertools import chain
from pathlib import Path


def add(groups: dict[str, argparse._SubParsersAction[argparse.ArgumentParser]]) -> None:
    """Add `diff`."""
    parser = groups[""].add_parser(
        "diff",
        help="how two runs differ: settings, environment, data, model, metrics, weights",
        description="Compare two run folders: settings, environment, data, model, what was in force, metrics, weights "
        "and result. The exit code is 0 when nothing differs but time, folder and speed, 1 when something does.",
    )
    parser.add_argument("a", type=Path, metavar="A", help="a run folder")
    parser.add_argument("b", type=Path, metavar="B", help="another")
    parser.add_argument("--json", action="store_true", help="print all as JSON")
    parser.set_defaults(run=_diff)


def _diff(arguments: argparse.Namespace) -> int:
    from sftx.commands.run_report import headings, section_lines
    from sftx.runs.saved.comparison import compare
    from sftx.runs.saved.saved_run import open_run

    a, b = open_run(arguments.a), open_run(arguments.b)
    sections = compare(a, b)
    differs = any(section.differs for section in sections)
    if arguments.json:
        facts = {"a": str(a.path), "b": str(b.path), "differs": differs}
        print(json.dumps(facts | {s.name: s.as_dict() for s in sections}, ensure_ascii=True, indent=2))
        return int(differs)
    lines = [headings("a", a), headings("b", b), *(section_lines(section, a, b) for section in sections)]
    for line in chain.from_iterable(lines):
        print(line)
    return int(differs)
