"""Token stores that are kept: each under a key that follows from everything its bytes follow from.

    $SFTX_CACHE/tokens/KEY/          rows.arrow, skipped.jsonl, store.json; published by one rename
    $SFTX_CACHE/tokens/KEY.lock      held by who builds it; the system frees it when that process ends

Nothing heavy is imported before a store is opened, so that `sftx data cache ls` answers at once.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftx.errors import DataError
from sftx.files import cache_root, explained, write_folder, write_json

if TYPE_CHECKING:
    from sftx.data.policy import EncodePolicy
    from sftx.data.record import Record
    from sftx.data.store import TokenRows
    from sftx.data.template import ChatTemplate

log = logging.getLogger("sftx")
DATA_VERSION = 3
"""Part of every key: raise it when the same records would become other rows, or a store another form."""
FACTS = "store.json"


@dataclass(frozen=True)
class RecordFile:
    """A file of the corpus: what its records call it, and the hash of what is read from it."""

    path: str
    sha256: str


@dataclass(frozen=True)
class Names:
    """What people call the parts of a store; no part of the key."""

    corpus: str = ""
    model: str = ""
    template: str = ""


@dataclass(frozen=True)
class Entry:
    """A store as `sftx data cache ls` shows it."""

    key: str
    names: Names
    rows: int
    tokens: int
    bytes: int
    built: float
    """Seconds since 1970."""


def store_key(
    files: Sequence[RecordFile], count: int, template: ChatTemplate, policy: EncodePolicy, selection: str = ""
) -> str:
    """Return the key of the rows that a template makes of the first `count` records of some files.

    `selection` names the records where they are chosen otherwise.
    """
    tokenizer = template.tokenizer
    recipe = {
        "version": DATA_VERSION,
        "libraries": {name: version(name) for name in ("tokenizers", "transformers", "jinja2")},
        "files": [file.sha256 for file in files],
        "records": [count, selection],
        # As it is used: whichever files it came from, and with what loading made of them.
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode("utf-8", "surrogatepass")).hexdigest(),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "template": template.source,
        "stop_tokens": list(template.stop_tokens),
        "date": template.date,
        "policy": asdict(policy),
    }
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:32]


def open_rows(
    records: Sequence[Record],
    files: Sequence[RecordFile],
    template: ChatTemplate,
    policy: EncodePolicy,
    *,
    workers: int | None = None,
    selection: str = "",
    names: Names | None = None,
) -> TokenRows:
    """Return the rows of a corpus, tokenising it when no process has done so before.

    Errors:
        DataError: no record can be learned from, or the policy refuses one.
        SftxError: a process that tokenises was ended; or the cache cannot be written.
    """
    key = store_key(files, len(records), template, policy, selection)
    folder = _folder() / key
    paths = [file.path for file in files]
    rows = _opened(folder, key, paths)
    if rows is not None:
        return rows
    with _locked(key):
        rows = _opened(folder, key, paths)  # another process may have built it meanwhile
        if rows is None:
            _sweep(key)
            _build(folder, key, records, paths, template, policy, workers, names or Names())
            rows = _opened(folder, key, paths)
    if rows is None:
        raise DataError(f"{folder}: the tokens that were just written there cannot be read back.")
    return rows


def _build(
    folder: Path,
    key: str,
    records: Sequence[Record],
    paths: Sequence[str],
    template: ChatTemplate,
    policy: EncodePolicy,
    workers: int | None,
    names: Names,
) -> None:
    from sftx.data.tokenise import encode_blocks
    from sftx.data.writer import StoreWriter

    started = time.perf_counter()

    def fill(into: Path) -> None:
        blocks = encode_blocks(records, template, policy, workers)
        with closing(blocks), StoreWriter(into, key, paths) as writer:
            for block in blocks:
                writer.add(block)
            totals = writer.finish()
        if totals.skipped and not totals.rows:
            raise DataError(f"no row can be trained on. The first of {totals.skipped}: {writer.first_skipped}")
        write_json(into / FACTS, {"key": key, "names": asdict(names), "totals": asdict(totals)})

    write_folder(folder, fill, replace=True)
    log.debug("tokenised %d records in %.1f s: %s", len(records), time.perf_counter() - started, folder)


def _opened(folder: Path, key: str, paths: Sequence[str]) -> TokenRows | None:
    """Return a store that is there as it was left, or None."""
    facts = _facts(folder)
    if facts is None or facts.get("key") != key:
        return None
    from sftx.data.store import TokenRows
    from sftx.data.writer import Totals

    try:
        return TokenRows(folder, key, paths, Totals(**facts["totals"]))
    except (DataError, TypeError, KeyError) as error:
        log.warning("%s: is not as it was left, and is made anew: %s", folder, error)
        return None


def _facts(folder: Path) -> dict[str, Any] | None:
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) else None


def _folder() -> Path:
    return cache_root() / "tokens"


@contextmanager
def _locked(key: str, *, wait: bool = True) -> Iterator[bool]:
    """Let no other process build or remove a store meanwhile; false when one does and `wait` is not asked for."""
    path = _folder() / f"{key}.lock"
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with explained(path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _flock(handle, key, wait=wait):
                yield False
                return
            if not _is(path, handle):
                continue  # who held it has removed it, and it may have been made anew
            yield True
            return
        finally:
            os.close(handle)


def _flock(handle: int, key: str, *, wait: bool) -> bool:
    """Take the lock of an open file; true when it is held."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            return True  # a file system without locks: stores are built more than once, and published whole
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        if not wait:
            return False
        log.info("another process tokenises this corpus: waiting for it (%s)", key[:12])
        fcntl.flock(handle, fcntl.LOCK_EX)
    return True


def _is(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _sweep(key: str) -> None:
    """Remove what a process that was ended left behind; only with the lock held."""
    for left in _folder().glob(f".{key}.*"):
        shutil.rmtree(left, ignore_errors=True)


def entries() -> list[Entry]:
    """Return the stores that are kept, the newest first."""
    found = []
    for folder in _folder().glob("*/"):
        facts = None if folder.name.startswith(".") else _facts(folder)
        with suppress(OSError, KeyError, TypeError):
            if facts is not None:
                size = sum(file.stat().st_size for file in folder.iterdir())
                totals, built = facts["totals"], (folder / FACTS).stat().st_mtime
                found.append(Entry(folder.name, Names(**facts["names"]), totals["rows"], totals["tokens"], size, built))
    return sorted(found, key=lambda entry: (-entry.built, entry.key))


def remove(key: str) -> bool:
    """Remove a store and whatever belongs to it; false when a process is building it."""
    with _locked(key, wait=False) as held:
        if not held:
            return False
        folder = _folder() / key
        with explained(folder):
            if folder.is_dir():
                folder.rename(_folder() / f".{key}.removed")  # in one step: never half of it under its name
            _sweep(key)
            (_folder() / f"{key}.lock").unlink(missing_ok=True)
    return True


def keys() -> list[str]:
    """Return the keys of all that lies in the cache, whole or not."""
    names = {path.name.removesuffix(".lock") for path in _folder().glob("*") if not path.name.startswith(".")}
    return sorted(names | {path.name.split(".")[1] for path in _folder().glob(".*.*")})
