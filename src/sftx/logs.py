"""The run's messages: on the terminal and in each trial's `train.log`; those of other packages in `train.log` alone.

`hydra.verbose=true`, or a list of loggers, adds what other packages log for debugging.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from sftx.files import explained
from sftx.secrets import scrub_text
from sftx.terminal import visible_lines

LOG_TIME = "%Y-%m-%d %H:%M:%S,000"
"""As logging writes it."""
ONLY = "default"
"""Name of the trial of a run that has only one."""
ONLY_TO_FILE = {"only_to_file": True}
"""Given as `extra` to a message that the terminal has in another form."""
MOST_RECORDS = 1000
"""Messages kept for a `train.log` that is not open yet."""


class VisibleFormatter(logging.Formatter):
    """Writes log lines without control characters of the user's files."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a record."""
        return visible_lines(super().format(record))


class RedactingFormatter(VisibleFormatter):
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


_trial_name: ContextVar[str | None] = ContextVar("trial_name", default=None)


@contextmanager
def log_context(trial: str) -> Iterator[None]:
    """Let the messages inside the block be those of one trial."""
    token = _trial_name.set(trial)
    try:
        yield
    finally:
        _trial_name.reset(token)


def _labelled(record: logging.LogRecord) -> bool:
    """Put the name of the log context's trial before a message, when there are several trials."""
    name = _trial_name.get()
    record.label = "" if name in (None, ONLY) else f"[{name}] "
    return True


class LogFile(logging.FileHandler):
    """A log file that a run continues without if the disk refuses it."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Say it once, and write no more."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        self.setLevel(logging.CRITICAL + 1)
        logging.getLogger("sftx").warning("%s: cannot be written (%s): continuing without it", self.baseFilename, error)


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
        handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(message)s"))
        handler.addFilter(lambda record: _trial_name.get() in (None, trial))
        self.logger.addHandler(handler)
        self.third_party.to(handler)

    def close(self) -> None:
        """Let go of all handlers."""
        for handler in list(self.logger.handlers):
            self.logger.removeHandler(handler)
            with suppress(OSError):  # what a full disk has refused before
                handler.close()


class ThirdPartyLog(logging.Handler):
    """Receives what other packages log inside the block, and Python's warnings, for each file that is opened."""

    def __init__(self) -> None:
        verbose = HydraConfig.initialized() and HydraConfig.get().verbose  # it lowers the level of the loggers
        super().__init__(logging.NOTSET if verbose else logging.WARNING)
        self._records: list[logging.LogRecord] = []
        self._files: list[logging.Handler] = []

    def __enter__(self) -> ThirdPartyLog:
        logging.getLogger().addHandler(self)
        logging.captureWarnings(True)
        return self

    def __exit__(self, *_: object) -> None:
        logging.captureWarnings(False)
        logging.getLogger().removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message to every file, and keep it for those that are opened later."""
        if len(self._records) < MOST_RECORDS:
            self._records.append(record)
        for file in self._files:
            file.handle(record)

    def to(self, file: logging.Handler) -> None:
        """Write the messages so far and those to come to a file as well."""
        for record in self._records:
            file.handle(record)
        self._files.append(file)
