"""A run folder as it was left, whoever made it and however it ended: read, believed in nothing, changed in nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sftx.config.derive import SEQUENCES
from sftx.config.yamlfile import read_yaml
from sftx.errors import RunFolderError, nearest
from sftx.runs.folder import MANIFEST
from sftx.runs.metrics import read_metrics
from sftx.terminal import visible

CONFIG, METRICS, TRIAL, FINAL = "config.yaml", "metrics.jsonl", "trial.json", "final"
LISTED = 8
"""Folders that a message names at most."""
Records = dict[int, dict[str, Any]]
"""Step -> metric -> value."""


@dataclass(frozen=True)
class PastRun:
    """What a run folder says of itself; `problems` says of each file that cannot be read why."""

    path: Path
    config: dict[str, Any] | None
    manifest: dict[str, Any] | None
    records: Records
    problems: dict[str, str] = field(default_factory=dict)

    def fact(self, *keys: str) -> Any:
        """Return a fact of the manifest, or None when it is not there."""
        return at(self.manifest, *keys)

    @property
    def status(self) -> str:
        """How it ended, as its manifest says: running, completed, stopped or failed."""
        return str(self.fact("status") or "unknown")

    @property
    def ranks(self) -> int:
        """How many processes it was made by; runs that did not store it say it by their sequences a step."""
        found = self.fact("ranks")
        if found is None:
            known = self.config or {}
            share = [known.get("per_device_train_batch_size"), known.get("gradient_accumulation_steps")]
            sequences = self.fact("identity", "config", SEQUENCES)
            if all(isinstance(n, int) and n > 0 for n in [*share, sequences]):
                found = sequences // (share[0] * share[1])  # type: ignore[operator]
        return found if isinstance(found, int) and found > 0 else 1

    @property
    def directory(self) -> Path | None:
        """The folder that it was started in, from which its relative paths lead."""
        found = self.fact("directory")
        return Path(found) if isinstance(found, str) and Path(found).is_absolute() else None

    @property
    def last_step(self) -> int:
        """The last step that is recorded."""
        return max(self.records, default=0)

    def weights(self) -> dict[str, Path]:
        """Return the files of `final/` that hold weights."""
        return {p.name: p for p in sorted((self.path / FINAL).glob("*.safetensors"))}


def at(tree: Any, *keys: str) -> Any:
    """Return what lies in nested mappings under some keys, or None."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def open_run(path: Path) -> PastRun:
    """Read a run folder; a file of it that is damaged is a problem of the run, not an error.

    Errors:
        RunFolderError: there is no such folder, or it is not a run's; what is near is named.
    """
    _check_folder(path)
    problems: dict[str, str] = {}
    config = _config(path / CONFIG, problems)
    manifest = _json(path / MANIFEST, problems)
    return PastRun(path, config, manifest, _metrics(path / METRICS, problems), problems)


def is_run(folder: Path) -> bool:
    """Tell whether a folder looks like a run's; a checkpoint has a manifest too, but no config."""
    return (folder / CONFIG).is_file() or ((folder / MANIFEST).is_file() and (folder / METRICS).is_file())


def _check_folder(path: Path) -> None:
    if not path.exists():
        raise _missing(path)
    if not path.is_dir():
        raise RunFolderError(f"{path}: is a file, expected a run folder.{_around(path)}")
    if is_run(path):
        return
    if (path / TRIAL).is_file():
        error = str((_json(path / TRIAL, {}) or {}).get("error") or f"see {TRIAL}").splitlines()[0]
        why = visible(error)
        raise RunFolderError(f"{path}: this trial ended before it was a run: {why}")
    below = sorted((p.name for p in path.iterdir() if p.is_dir() and is_run(p)), key=lambda n: (len(n), n))
    if below:
        kind = "a sweep's folder" if any((path / n / TRIAL).is_file() for n in below) else "a folder of runs"
        what = "trials" if kind.startswith("a sweep") else "runs"
        raise RunFolderError(
            f"{path}: is {kind}, not a run's. Its {what}: {_listed(below)}. Name one: {path / below[0]}"
        )
    raise RunFolderError(f"{path}: is not a run folder: it holds no {CONFIG} and no {MANIFEST}.{_around(path)}")


def _around(path: Path) -> str:
    """Say which run a path lies in."""
    inside = next((p for p in path.absolute().parents if is_run(p)), None)
    return "" if inside is None else f" It lies in the run {inside}: name that."


def _missing(path: Path) -> RunFolderError:
    parent = path.absolute().parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
    names = sorted(p.name for p in parent.iterdir() if p.is_dir() and not p.name.startswith("."))
    near = nearest(path.name, names)
    hint = f" Did you mean `{parent / near}`?" if near else ""
    return RunFolderError(f"{path}: there is no such folder.{hint} Folders there: {_listed(names) or 'none'}.")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:LISTED]) + (f", ... ({len(names)})" if len(names) > LISTED else "")


def _config(path: Path, problems: dict[str, str]) -> dict[str, Any] | None:
    """Read `config.yaml` with the loader that undoes what wrote it: a text such as `1e5` stays one."""
    found = read_yaml(path)
    if found.problems:
        problems[CONFIG] = found.problems[0]
        return None
    try:
        tree = yaml.safe_load(found.text)
    except (yaml.YAMLError, ValueError) as error:
        problems[CONFIG] = f"{path}: cannot be read: {str(error).splitlines()[0]}."
        return None
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        problems[CONFIG] = f"{path}: holds no settings."
        return None
    return tree


def _json(path: Path, problems: dict[str, str]) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        problems[path.name] = f"{path}: cannot be read: {why}."
        return None
    if not isinstance(found, dict):
        problems[path.name] = f"{path}: cannot be read: expected an object."
        return None
    return found


def _metrics(path: Path, problems: dict[str, str]) -> Records:
    """Return the metrics of each step; a line cut off by a crash, and what follows it, is left out."""
    out: Records = {}
    try:
        lines = read_metrics(path)
    except (OSError, ValueError, RecursionError) as error:
        problems[path.name] = f"{path}: cannot be read: {error}."
        return out
    for record in lines:
        step = record.pop("step", None) if isinstance(record, dict) else None
        if isinstance(step, int):
            out.setdefault(step, {}).update(record)
    return out
