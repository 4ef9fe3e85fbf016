"""`sftx data cache`: the corpora that are kept."""

from __future__ import annotations

import argparse
import time

from sftx.data.store import cache
from sftx.errors import DataError, did_you_mean


def add(groups: dict[str, argparse._SubParsersAction[argparse.ArgumentParser]]) -> None:
    """Add `data cache ls` and `data cache rm`."""
    parser = groups["data"].add_parser("cache", help="the corpora that are kept, as records and as tokens")
    actions = parser.add_subparsers(required=True, metavar="ls|rm")
    listing = actions.add_parser("ls", help="list them: key, corpus, model and template, rows, tokens, size, age")
    listing.set_defaults(run=_list)
    removing = actions.add_parser("rm", help="remove some; they are made anew when they are asked for")
    removing.add_argument("keys", nargs="*", metavar="KEY", help="a key, or how it begins")
    removing.add_argument("--all", action="store_true", help="remove all")
    removing.set_defaults(run=_remove)


def _list(_: argparse.Namespace) -> int:
    entries = cache.entries()
    table = [("key", "corpus", "model / template", "rows", "tokens", "size", "age")]
    for e in entries:
        made_by = " / ".join(name for name in (e.names.model, e.names.template) if name)
        age = _age(time.time() - e.built)
        table.append(
            (
                e.key[:12],
                e.names.corpus,
                made_by,
                f"{e.rows:,}",
                f"{e.tokens:,}" if e.tokens is not None else "-",
                _size(e.bytes),
                age,
            )
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table if entries else []:
        cells = [c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        print("  ".join(cells).rstrip())
    total = f"{len(entries)} corpora, {_size(sum(e.bytes for e in entries))}"
    print(total if entries else "nothing is kept")
    return 0


def _remove(asked: argparse.Namespace) -> int:
    if asked.all == bool(asked.keys):
        raise DataError("sftx data cache rm: name keys (sftx data cache ls shows them), or --all.")
    known = cache.keys()
    chosen = known if asked.all else [_one(known, key) for key in asked.keys]
    sizes = {e.key: e.bytes for e in cache.entries()}
    busy = [key for key in dict.fromkeys(chosen) if not cache.remove(key)]
    removed = [key for key in dict.fromkeys(chosen) if key not in busy]
    print(f"removed {len(removed)}, {_size(sum(sizes.get(key, 0) for key in removed))}")
    if busy:
        raise DataError(f"being built by another process, left alone: {', '.join(key[:12] for key in busy)}.")
    return 0


def _one(known: list[str], asked: str) -> str:
    found = [key for key in known if key.startswith(asked)]
    if len(found) != 1:
        what = f"fits {len(found)} keys; give more of it" if found else "no such key"
        raise DataError(f"{asked}: {what}.{'' if found else did_you_mean(asked, [k[:12] for k in known])}")
    return found[0]


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
