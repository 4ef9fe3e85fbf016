"""The run folder: `output_dir`, which explains how its contents came to be."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
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
from sftx.runs.third_party_log import ThirdPartyLog
from sftx.secrets import scrub, scrub_text
from sftx.terminal import visible_lines

MANIFEST, LOCK = "manifest.json", ".lock"
LATEST = Path("outputs/latest")
"""A link to the newest run in `outputs/` of the working directory."""
FORMAT = 2
"""Of run folders, in their manifest; raise it when an older version could not continue a new run, or the reverse."""
LOG_TIME = "%Y-%m-%d %H:%M:%S,000"
"""As logging writes it."""
ONLY = "default"
"""Name of the trial of a run that has only one."""
ONLY_TO_FILE = {"only_to_file": True}
"""Given as `extra` to a message that the terminal has in another form."""


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

        Errors:
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
                f"Choose another output_dir, or resume=auto to go on with it."
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
                + "\nChoose another output_dir, or repeat that run's settings to go on with it."
            )
        return manifest

    def _without_manifest(self) -> str:
        """Say what to do with a folder of which it is not known which run it holds."""
        newest = max(self.checkpoints.glob("step-*"), default=None)
        cure = (
            f"or go on in another folder: output_dir=NEW resume={newest}" if newest else "or choose another output_dir"
        )
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
        with suppress(OSError, ValueError, SftxError):  # the error itself is said in any case
            if not (self.path / MANIFEST).is_file() or self.lock() is not None:
                return
            try:
                self.manifest = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
                if self.manifest["status"] == "running":
                    self.update(status=status, error=f"{type(error).__name__}: {error}")
                    append_line(self.log, scrub_text(f"{datetime.now():{LOG_TIME}} ERROR {status}: {summary(error)}"))
            finally:
                self.unlock()


class VisibleFormatter(logging.Formatter):
    """Writes log lines without control characters of the user's files."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a record."""
        return visible_lines(super().format(record))


def point_latest(folder: Path) -> str | None:
    """Let `outputs/latest` lead to a run in `outputs/`, for convenience only; return why that cannot be, or None."""
    if not folder.absolute().is_relative_to(LATEST.parent.absolute()):
        return None
    try:
        replace_link(LATEST, folder)
    except OSError as error:
        return f"{LATEST}: does not lead to this run: {error.strerror or error}"
    return None


class Discreet(VisibleFormatter):
    """Writes log lines without the secrets in them."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a record."""
        return scrub_text(super().format(record))


class TqdmHandler(logging.Handler):
    """Prints log lines without tearing a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line."""
        from tqdm import tqdm

        tqdm.write(self.format(record))


_speaking: ContextVar[str | None] = ContextVar("speaking", default=None)


@contextmanager
def speaking(trial: str) -> Iterator[None]:
    """Let the messages inside the block be those of one trial."""
    token = _speaking.set(trial)
    try:
        yield
    finally:
        _speaking.reset(token)


def _labelled(record: logging.LogRecord) -> bool:
    """Put the speaking trial's name before its messages, when there are several trials."""
    name = _speaking.get()
    record.label = "" if name in (None, ONLY) else f"[{name}] "
    return True


class LogFile(logging.FileHandler):
    """A log file without which a run goes on when the disk refuses it."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Say it once, and write no more."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        self.setLevel(logging.CRITICAL + 1)
        logging.getLogger("sftx").warning("%s: cannot be written (%s): goes on without", self.baseFilename, error)


class RunLog:
    """The run's messages: on the terminal, and in each trial's `train.log` with the time."""

    def __init__(self, third_party: ThirdPartyLog, *, is_main: bool) -> None:
        self.third_party = third_party
        self.logger = logging.getLogger("sftx")
        self.logger.setLevel(logging.INFO if is_main else logging.ERROR)
        self.logger.propagate = False
        self.close()
        self.terminal = TqdmHandler()
        self.terminal.setFormatter(VisibleFormatter("%(label)s%(message)s"))
        self.terminal.addFilter(_labelled)
        self.terminal.addFilter(lambda record: not hasattr(record, "only_to_file"))
        self.logger.addHandler(self.terminal)

    def to_file(self, path: Path, trial: str) -> None:
        """Write further messages to a trial's file as well, but not those of other trials."""
        with explained(path):
            handler = LogFile(path, encoding="utf-8")
        handler.setFormatter(Discreet("%(asctime)s %(levelname)s %(message)s"))
        handler.addFilter(lambda record: _speaking.get() in (None, trial))
        self.logger.addHandler(handler)
        self.third_party.to(handler)

    def close(self) -> None:
        """Let go of all handlers."""
        for handler in list(self.logger.handlers):
            self.logger.removeHandler(handler)
            with suppress(OSError):  # what a full disk has refused before
                handler.close()
