"""Corpora that are kept, as records and as tokens: each under a key that follows from all that its bytes follow from.

    $SFTX_CACHE/corpora/KEY/          an Arrow file, skipped.jsonl, facts.json; published by one rename
    $SFTX_CACHE/corpora/.KEY.lock     held by the process that builds it

Nothing heavy is imported here, so that `sftx data cache ls` answers at once.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sftx.data.store.digests import keep_sha256, known_sha256, sha256_file
from sftx.errors import DataError
from sftx.files import cache_root, explained, write_folder, write_json
from sftx.locks import Locked, exclusive

log = logging.getLogger("sftx")
FACTS, SKIPPED = "facts.json", "skipped.jsonl"


@dataclass(frozen=True)
class Names:
    """What people call the parts of an entry; no part of the key."""

    corpus: str = ""
    model: str = ""
    template: str = ""


@dataclass(frozen=True)
class Entry:
    """A corpus as `sftx data cache ls` shows it."""

    key: str
    names: Names
    rows: int
    tokens: int | None
    """None for records that are not tokenised."""
    bytes: int
    built: float
    """Seconds since 1970."""


def open_entry(key: str, fill: Callable[[Path], dict[str, Any]], names: Names) -> dict[str, Any]:
    """Return the facts of an entry; where there is none, `fill` writes its files and returns its facts.

    Of many processes one builds and the others wait for it. An entry whose files are not as they were written is
    built anew.

    Raises:
        RunFolderError: the cache cannot be written.
    """
    facts = _intact(key)
    if facts is None:
        with _building(key):
            facts = _intact(key)  # another process may have built it meanwhile
            if facts is None:
                _sweep(key)
                facts = _build(key, fill, names)
    return facts


def entry_folder(key: str) -> Path:
    """Return the folder of an entry's files."""
    return _root() / key


def entries() -> list[Entry]:
    """Return what is kept, the newest first."""
    found = []
    for folder in _root().glob("[!.]*/"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            facts = _facts(folder)
            size, built = sum(file.stat().st_size for file in folder.iterdir()), (folder / FACTS).stat().st_mtime
            names = Names(**facts["names"])
            found.append(Entry(folder.name, names, facts["rows"], facts.get("tokens"), size, built))
    return sorted(found, key=lambda entry: (-entry.built, entry.key))


def keys() -> list[str]:
    """Return the keys of all that lies in the cache, complete or not."""
    return sorted({path.name.lstrip(".").split(".")[0] for path in _root().glob("*")})


def remove(key: str) -> bool:
    """Remove an entry and what was left of it; return False while a process is building it."""
    folder = entry_folder(key)
    try:
        with exclusive(_lock(key), wait=False), explained(folder):
            if folder.is_dir():
                folder.rename(_root() / f".{key}.removed")  # in one step: never half of it under its name
            _sweep(key)
    except Locked:
        return False
    return True


def _build(key: str, fill: Callable[[Path], dict[str, Any]], names: Names) -> dict[str, Any]:
    folder = entry_folder(key)
    facts: dict[str, Any] = {}

    def complete(into: Path) -> None:
        facts.update(fill(into))
        facts["files"] = {file.name: sha256_file(file) for file in sorted(into.iterdir())}
        write_json(into / FACTS, {"names": asdict(names)} | facts)

    write_folder(folder, complete, replace=True)
    for name, digest in facts["files"].items():
        keep_sha256(folder / name, digest)
    return facts


def _intact(key: str) -> dict[str, Any] | None:
    """Return the facts of an entry whose files are as they were written, or None."""
    folder = entry_folder(key)
    if not folder.exists():
        return None
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, DataError):
        facts = _facts(folder)
        if all(known_sha256(folder / name) == digest for name, digest in facts["files"].items()):
            return facts
    log.warning("%s: is damaged, and is made anew", folder)
    return None


def _facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / FACTS).read_text(encoding="utf-8"))


def _root() -> Path:
    return cache_root() / "corpora"


def _lock(key: str) -> Path:
    return _root() / f".{key}.lock"


@contextmanager
def _building(key: str) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive(_lock(key), wait=False))
        except Locked as error:
            log.info("waiting for another process that prepares this corpus (%s)", error.holder)
            stack.enter_context(exclusive(_lock(key), wait=True))
        yield


def _sweep(key: str) -> None:
    """Remove what a process that was killed left behind; only with the lock held."""
    for left in _root().glob(f".{key}.*/"):
        shutil.rmtree(left, ignore_errors=True)
