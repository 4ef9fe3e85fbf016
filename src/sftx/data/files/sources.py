"""Find what a corpus is read from: a file, several, a folder, a saved dataset, or one of the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftx import EMBEDDED_DATA
from sftx.data.files.hub import HUB_ID, hub_files
from sftx.data.records.read import is_known, source_name
from sftx.errors import DataError, nearest, nearest_folder

STATE, SPLITS = "state.json", "dataset_dict.json"
EMBEDDED_FOLDER = "data"
"""How `train_file_path` names the folder of the embedded corpus."""


@dataclass(frozen=True)
class Source:
    """A file of the corpus; `name` is the part of the corpus it belongs to, whose weight can be set."""

    path: Path
    name: str
    hub: bool = False
    """True for a dataset's id: `fetch` puts its files in its place."""


def find_sources(folder: str, names: str | Sequence[str], *, key: str) -> list[Source]:
    """Return the files that `names` mean in a folder, sorted within each name; nothing is fetched yet.

    A name is a file (found as `find_file` does), a pattern such as `*.csv`, a folder, a folder that
    `datasets` saved, or, when there is nothing of that name, the id of a hub dataset.

    Raises:
        DataError: nothing of that name, found twice, or named twice.
    """
    wanted = [names] if isinstance(names, str) else list(names)
    if not wanted:
        raise DataError(f"{key}=[]: names no file; give at least one.")
    found = [source for name in wanted for source in _find(folder, name, key)]
    seen: set[Path] = set()
    for source in found:
        if source.path in seen:
            raise DataError(f"{key}: {source.path} is named twice; leave one out.")
        seen.add(source.path)
    return found


def _base(folder: str, name: str) -> Path:
    """Return the folder; the embedded corpus is found from any working directory that has no such file."""
    base = Path(folder).expanduser()
    embedded = folder == EMBEDDED_FOLDER and (EMBEDDED_DATA / name).is_file() and not _places(base, name)
    return EMBEDDED_DATA if embedded else base


def _find(folder: str, name: str, key: str) -> list[Source]:
    base = _base(folder, name)
    hub = HUB_ID.fullmatch(name)
    if hub and not is_known(Path(name)) and not _places(base, name):
        return [Source(Path(name), name.partition(":")[0], hub=True)]
    _check_folder(base, folder, name, key)
    if any(place.is_file() for place in _places(base, name)):
        path = find_file(folder, name, key=key)
        return [Source(path, source_name(path))]
    folders = _places(base, name)
    if len(folders) > 1:
        raise _twice(key, name, folders)
    if folders:
        return _in_folder(folders[0], name, key)
    if any(character in name for character in "*?["):
        return _matching(base, name, key)
    raise _missing(base, name, key)


def _places(base: Path, name: str) -> list[Path]:
    return [p for p in _candidates(base, name) if p.exists()]


def _candidates(base: Path, name: str) -> list[Path]:
    """Return where a name may be: in the folder or its `csv/`; a whole path is one place."""
    return list(dict.fromkeys((base / name, base / "csv" / name)))


def _matching(base: Path, pattern: str, key: str) -> list[Source]:
    try:
        found = [sorted(p for p in d.glob(pattern) if p.is_file()) for d in (base, base / "csv") if d.is_dir()]
    except (ValueError, NotImplementedError) as error:  # `Path.glob` raises the latter for a whole path
        raise DataError(f"{_given(key, pattern)}: is not a pattern of names inside {base}: {error}.") from error
    names = [{p.name for p in paths} for paths in found]
    both = set.intersection(*names) if len(names) == 2 and "/" not in pattern else set()
    for name in sorted(both):
        raise _twice(key, name, [base / name, base / "csv" / name])
    paths = [path for paths in found for path in paths]
    if not paths:
        raise DataError(
            f"{_given(key, pattern)}: no file in {base} or {base / 'csv'} has such a name. "
            f"Files there: {_listing(base)}."
        )
    return [Source(path, source_name(path)) for path in paths]


def _in_folder(folder: Path, name: str, key: str) -> list[Source]:
    """Return the files of a folder, or of a dataset that was saved there."""
    if (folder / SPLITS).is_file():
        splits = _json(folder / SPLITS).get("splits") or []
        chosen = "train" if "train" in splits else splits[0] if len(splits) == 1 else None
        if chosen is None:
            some = _given(key, f"{name}/{splits[0]}") if splits else "a split"
            raise DataError(f"{folder}: holds the splits {', '.join(map(str, splits)) or 'none'}; name one: {some}.")
        return _saved(folder / chosen, folder.resolve().name)
    if (folder / STATE).is_file():
        return _saved(folder, folder.resolve().name)
    paths = sorted(p for p in folder.iterdir() if p.is_file() and is_known(p) and not p.name.startswith("."))
    if not paths:
        raise DataError(
            f"{_given(key, name)}: the folder {folder} holds no corpus file. Files there: {_listing(folder)}."
        )
    return [Source(path, source_name(path)) for path in paths]


def _saved(folder: Path, name: str) -> list[Source]:
    """Return the Arrow files of a dataset that `save_to_disk` wrote."""
    state = _json(folder / STATE)
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise DataError(f"{folder}: holds a selection of rows beside the data; call flatten_indices() and save again.")
    files = state.get("_data_files")
    if not isinstance(files, list) or not all(isinstance(f, dict) and "filename" in f for f in files) or not files:
        raise DataError(f"{folder / STATE}: names no data files; save the dataset again.")
    paths = [folder / str(f["filename"]) for f in files]
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: is missing, {folder / STATE} names it; copy the whole folder again.")
    return [Source(path, name) for path in paths]


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}; save the dataset again.") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: is not an object; save the dataset again.")
    return value


def fetch(sources: Iterable[Source], *, key: str) -> list[Source]:
    """Return the sources with each hub dataset's files in its place.

    Raises:
        DataError: `datasets` is not installed, or the hub has no such dataset or cannot be reached.
    """
    return [found for source in sources for found in (_fetched(source, key) if source.hub else [source])]


def _fetched(source: Source, key: str) -> list[Source]:
    name = source.path.as_posix()
    return [Source(path, source.name) for path in hub_files(name, _given(key, name))]


def _check_folder(base: Path, folder: str, name: str, key: str) -> None:
    if base.is_file():
        raise DataError(
            f"train_file_path={folder}: is a file, expected its folder: "
            f"train_file_path={base.parent} train_file_name={base.name}."
        )
    if not base.is_dir():
        raise DataError(
            f"train_file_path={folder}: there is no such folder (looked at {base.absolute()}).{nearest_folder(folder)}"
        )


def find_file(folder: str, name: str, *, key: str) -> Path:
    """Return the corpus's path: directly in the folder, or in its `csv/` subfolder (the original layout).

    Raises:
        DataError: no such folder, no such file (the nearest name is given), or found in both places.
    """
    base = _base(folder, name)
    _check_folder(base, folder, name, key)
    found = [p for p in _candidates(base, name) if p.is_file()]
    if len(found) == 2:
        raise _twice(key, name, found)
    if not found:
        raise _missing(base, name, key)
    return found[0]


def _twice(key: str, name: str, found: Sequence[Path]) -> DataError:
    return DataError(
        f"{_given(key, name)}: found both as {found[0]} and as {found[1]}. "
        f"Remove one, or name the folder meant: train_file_path={found[1].parent}."
    )


def _names(base: Path) -> list[str]:
    return sorted(p.name for d in (base, base / "csv") if d.is_dir() for p in d.iterdir() if p.is_file())


def _listing(base: Path) -> str:
    there = _names(base)
    return (", ".join(there[:10]) + (", ..." if len(there) > 10 else "")) or "none"


def _missing(base: Path, name: str, key: str) -> DataError:
    there = (base / name).parent
    if not there.is_dir():
        return DataError(f"{_given(key, name)}: no such file in {there}: there is no such folder.")
    near = nearest(Path(name).name, _names(there))
    hint = f" Did you mean `{Path(name).with_name(near)}`?" if near else ""
    both = f"{there} or {there / 'csv'}" if there == base else str(there)
    return DataError(f"{_given(key, name)}: no such file in {both}.{hint} Files there: {_listing(there)}.")


def _given(key: str, name: str) -> str:
    """Return how a name was given: as a setting, or alone."""
    return f"{key}={name}" if key else name
