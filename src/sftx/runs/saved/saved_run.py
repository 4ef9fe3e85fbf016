"""Reads a run folder of any origin, however the run ended; nothing in it is trusted, and nothing is changed."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from sftx.config.composition.yaml_file import read_yaml
from sftx.errors import RunFolderError, nearest_folder
from sftx.terminal import visible
from sftx.training.saving.metrics import read_metrics
from sftx.training.saving.run_folder import MANIFEST

CONFIG, METRICS, TRIAL, FINAL = "config.yaml", "metrics.jsonl", "trial.json", "final"
LISTED = 8
"""Folders that a message names at most."""
Records = dict[int, dict[str, Any]]
"""Step -> metric -> value."""


class SavedRun:
    """What a run folder says of itself; a file that cannot be read is empty, and `problems` says why."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._problems: dict[str, str] = {}

    @property
    def problems(self) -> dict[str, str]:
        """Why each file cannot be read, of those that cannot."""
        _ = self.config, self.manifest, self.records
        return self._problems

    @cached_property
    def config(self) -> dict[str, Any]:
        """The settings, read with the loader that undoes what wrote them: a text such as `1e5` stays one."""
        path = self.path / CONFIG
        found = read_yaml(path)
        if found.problems:
            self._problems[CONFIG] = found.problems[0]
            return {}
        try:
            tree = yaml.safe_load(found.text)
        except (yaml.YAMLError, ValueError) as error:
            self._problems[CONFIG] = f"{path}: cannot be read: {str(error).splitlines()[0]}."
            return {}
        if isinstance(tree, dict) and all(isinstance(key, str) for key in tree):
            return tree
        self._problems[CONFIG] = f"{path}: holds no settings."
        return {}

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What `manifest.json` holds."""
        return self._read_object(MANIFEST)

    @cached_property
    def trial(self) -> dict[str, Any]:
        """What a sweep noted of its trial; empty for other runs."""
        return self._read_object(TRIAL) if (self.path / TRIAL).is_file() else {}

    @cached_property
    def records(self) -> Records:
        """The metrics of each step; lines that a crash cut off or damaged are left out."""
        out: Records = {}
        try:
            for record in read_metrics(self.path / METRICS):
                out.setdefault(int(record.pop("step")), {}).update(record)
        except (OSError, ValueError, RecursionError) as error:
            self._problems[METRICS] = f"{self.path / METRICS}: cannot be read: {error}."
        return out

    def _read_object(self, name: str) -> dict[str, Any]:
        return read_object(self.path / name, self._problems)

    def fact(self, *keys: str) -> Any:
        """Return a fact of the manifest, or None if it is not there."""
        return at(self.manifest, *keys)

    @property
    def status(self) -> str:
        """How it ended, as its manifest says: running, completed, stopped or failed."""
        return str(self.fact("status") or "unknown")

    @property
    def ranks(self) -> int:
        """The number of processes that made it."""
        found = self.fact("ranks")
        return found if isinstance(found, int) and found > 0 else 1

    @property
    def directory(self) -> Path | None:
        """The folder that it was started in, which its relative paths start from."""
        found = self.fact("directory")
        return Path(found) if isinstance(found, str) and Path(found).is_absolute() else None

    @property
    def last_step(self) -> int:
        """The last step that is recorded."""
        return max(self.records, default=0)

    @property
    def attempts(self) -> int:
        """How often it was started or resumed."""
        found = self.fact("attempts")
        return len(found) if isinstance(found, list) else 0

    def weights(self) -> dict[str, Path]:
        """Return the files of `final/` that hold weights."""
        return {f"{FINAL}/{p.name}": p for p in sorted((self.path / FINAL).glob("*.safetensors"))}


def read_object(path: Path, problems: dict[str, str] | None = None) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one, and a problem, if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        why: object = "expected an object"
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else error
    if problems is not None:
        problems[path.name] = f"{path}: cannot be read: {why}."
    return {}


def at(tree: Any, *keys: str) -> Any:
    """Return what lies in nested mappings under some keys, or None."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def is_run(folder: Path) -> bool:
    """Return True if a folder looks like a run's; a checkpoint has a manifest too, but no config."""
    return (folder / CONFIG).is_file() or ((folder / MANIFEST).is_file() and (folder / METRICS).is_file())


def open_run(path: Path) -> SavedRun:
    """Read a run folder; a damaged file of it is a problem of the run, not an error.

    Raises:
        RunFolderError: there is no such folder, or it is not a run's; the nearest run is named.
    """
    if not path.exists():
        raise RunFolderError(f"{path}: there is no such folder.{nearest_folder(str(path))}")
    run = SavedRun(path)
    if path.is_dir() and is_run(path):
        return run
    if run.trial:
        error = str(run.trial.get("error") or f"see {TRIAL}").splitlines()[0]
        raise RunFolderError(f"{path}: this trial ended before it was a run: {visible(error)}")
    around = next((p for p in path.absolute().parents if is_run(p)), None)
    hint = "" if around is None else f" It lies in the run {around}: name that."
    if not path.is_dir():
        raise RunFolderError(f"{path}: is a file, expected a run folder.{hint}")
    below = sorted((p.name for p in path.iterdir() if p.is_dir() and is_run(p)), key=lambda n: (len(n), n))
    if not below:
        raise RunFolderError(f"{path}: is not a run folder: it holds no {CONFIG} and no {MANIFEST}.{hint}")
    swept = any((path / name / TRIAL).is_file() for name in below)
    kind, what = ("a sweep's folder", "trials") if swept else ("a folder of runs", "runs")
    names = ", ".join(below[:LISTED]) + (f", ... ({len(below)})" if len(below) > LISTED else "")
    raise RunFolderError(f"{path}: is {kind}, not a run's. Its {what}: {names}. Name one: {path / below[0]}")
