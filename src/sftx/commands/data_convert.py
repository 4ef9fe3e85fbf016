"""`sftx data convert`: files of any format and schema as one plain JSONL."""

from __future__ import annotations

import argparse
from pathlib import Path

from sftx.commands.data_check import sort_words
from sftx.errors import DataError
from sftx.terminal import visible


def add(groups: dict[str, argparse._SubParsersAction[argparse.ArgumentParser]]) -> None:
    """Add `data convert`."""
    parser = groups["data"].add_parser(
        "convert",
        help="write files as one JSONL",
        description="Write the records of files as one JSONL: category, human, assistant where each is one question "
        "and its answer, else messages. Reading is set as in training, for example data.on_bad_rows=skip.",
    )
    parser.add_argument("words", nargs="+", metavar="FILE|key=value", help="files to read, then OUT.jsonl; settings")
    parser.set_defaults(run=_convert)


def _convert(asked: argparse.Namespace) -> int:
    files, settings = sort_words(asked.words)
    if len(files) < 2 or Path(files[-1]).suffix != ".jsonl":
        raise DataError(f"sftx data convert: expected FILES OUT.jsonl, got {' '.join(files)}.")
    from sftx.build import build
    from sftx.config.checks.check import freeze
    from sftx.config.composition.prepare import compose_checked
    from sftx.data.corpus import convert

    config = freeze(compose_checked(settings))
    done = convert(
        [Path(f) for f in files[:-1]],
        Path(files[-1]),
        build(config.data),
        keep_columns=not config.remove_unused_columns,
    )
    for reason in done.loaded.skipped():
        print(visible(f"left out: {reason}"))
    print(f"{files[-1]}: {done.rows:,} records, {done.schema}")
    return 0
