"""The run folder, `output_dir`: its files, its lock, its manifest."""

from __future__ import annotations

import json
from contextlib import ExitStack, suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from sftx.config.derive import differences
from sftx.config.schema import TrainConfig
from sftx.errors import RunFolderError, SftxError, other_format, summary
from sftx.files import (
    TEMPORARY,
    append_line,
    check_writable,
    explained,
    replace_link,
    sweep,
    write_json,
    write_text,
)
from sftx.locks import Locked, exclusive
from sftx.logs import LOG_TIME
from sftx.secrets import scrub, scrub_text

MANIFEST, LOCK = "manifest.json", ".lock"
LATEST = Path("outputs/latest")
"""A link to the newest run in `outputs/` of the working directory."""
FORMAT = 2
"""Of run folders, in their manifest; raise it when an older version could not continue a new run, or the reverse."""


class RunFolder:
    """Names and writes what is in a run folder; made only when the run is ready to start."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.final = path / "final"
        self.metrics = path / "metrics.jsonl"
        self.streamed_rows = path / "streamed_rows.jsonl"
        self.log = path / "train.log"
        self.manifest: dict[str, Any] = {}
        self.was_chosen = False
        """It was not named, but found: the newest unfinished run of the same identity."""
        self._lock = ExitStack()
        self._held = self._is_new = False

    def check(self, resume: str) -> None:
        """Raise if this folder could not hold a run; look only, change nothing.

        Raises:
            RunFolderError: not writable, not empty without being a run's, or a run's with `resume=never`.
        """
        check_writable(self.path)
        if not self.path.exists():
            return
        names = (p.name for p in self.path.iterdir())  # what a killed run left half-written is swept later
        there = sorted(n for n in names if n != "trial.json" and not n.startswith(LOCK) and not n.endswith(TEMPORARY))
        if not there:
            return
        if not (self.path / MANIFEST).is_file():
            if any(self.checkpoints.glob("step-*")):
                raise RunFolderError(f"{self.path / MANIFEST}: is missing. {self._without_manifest()}")
            raise RunFolderError(
                f"output_dir={self.path}: holds other files ({', '.join(there[:5])}), but no run of sftx. "
                f"Choose an empty or a new folder."
            )
        if resume == "never":
            raise RunFolderError(
                f"output_dir={self.path}: holds a run, and resume=never would overwrite it. "
                f"Choose another output_dir, or resume=auto to continue it."
            )

    def lock(self) -> str | None:
        """Keep other runs out until this process ends; return why that cannot be, or None."""
        if self._held:
            return None
        self._is_new |= not self.path.exists()
        try:
            self._lock.enter_context(exclusive(self.path / LOCK, wait=False))
        except Locked as error:
            return (
                f"output_dir={self.path}: another run is writing there ({error.holder}). Wait for it, end it, or "
                "choose another output_dir."
            )
        self._held = True
        for folder in (self.path, self.checkpoints):
            sweep(folder)
        return None

    def unlock(self) -> None:
        """Let other runs in; a folder that was made for the lock and is still empty is removed."""
        self._lock.close()
        self._held = False
        if self._is_new:
            with suppress(OSError):  # the run has written to it
                self.path.rmdir()

    def earlier(self, identity: dict[str, Any]) -> dict[str, Any] | None:
        """Return the manifest of the same run's earlier attempt, or None when the folder is new.

        Raises:
            RunFolderError: the folder holds another run, every difference is named; or one of another format.
        """
        path = self.path / MANIFEST
        if not path.is_file():
            return None
        try:
            manifest = dict(json.loads(path.read_text(encoding="utf-8")))
            number = manifest.get("format")
            before = dict(manifest["identity"]) if number in (FORMAT, None) else {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = str(error) if isinstance(error, OSError | ValueError) else "no run is described there"
            raise RunFolderError(f"{path}: cannot be read ({reason}). {self._without_manifest()}") from None
        if number != FORMAT:
            raise RunFolderError(
                f"{path}: {other_format(number, FORMAT)}. Continue the run with the version that made it, or choose "
                "another output_dir."
            )
        found = differences(before, scrub(json.loads(json.dumps(identity))))
        if found:
            raise RunFolderError(
                f"output_dir={self.path}: holds another run, which would be overwritten. It differs in:\n  "
                + "\n  ".join(found)
                + "\nChoose another output_dir, or repeat that run's settings to continue it."
            )
        return manifest

    def _without_manifest(self) -> str:
        """Say what to do with a folder of which it is not known which run it holds."""
        newest = max(self.checkpoints.glob("step-*"), default=None)
        cure = "or choose another output_dir"
        if newest:
            cure = f"or continue in another folder: output_dir=NEW resume={newest}"
        return f"It says which run this folder holds: put it back from a copy, {cure}."

    def open(self, config: TrainConfig, manifest: dict[str, Any]) -> None:
        """Make the folder and write what is known before the first step."""
        with explained(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self.manifest = scrub({"format": FORMAT} | manifest)
        self.update(status="running")  # first: by its manifest a folder is known as a run's
        plain = scrub(json.loads(json.dumps(asdict(config))))
        write_text(self.path / "config.yaml", yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=120))

    def update(self, **facts: Any) -> None:
        """Change facts of the manifest."""
        self.manifest |= scrub(facts)
        write_json(self.path / MANIFEST, self.manifest)

    def note_end(self, status: str, error: Exception) -> None:
        """Note how a run ended whose main process could not, unless another run is here by now."""
        with suppress(OSError, ValueError, SftxError):  # the error itself is reported in any case
            if not (self.path / MANIFEST).is_file() or self.lock() is not None:
                return
            try:
                self.manifest = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
                if self.manifest["status"] == "running":
                    self.update(status=status, error=f"{type(error).__name__}: {error}")
                    append_line(self.log, scrub_text(f"{datetime.now():{LOG_TIME}} ERROR {status}: {summary(error)}"))
            finally:
                self.unlock()


def point_latest(folder: Path) -> str | None:
    """Let `outputs/latest` lead to a run in `outputs/`, for convenience only; return why that cannot be, or None."""
    if not folder.absolute().is_relative_to(LATEST.parent.absolute()):
        return None
    try:
        replace_link(LATEST, folder)
    except OSError as error:
        return f"{LATEST}: does not lead to this run: {error.strerror or error}"
    return None
