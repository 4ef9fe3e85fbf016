"""Warnings of other packages: they go to `train.log`, not between the lines of the terminal.

`hydra.verbose=true`, or a list of loggers, adds what they log for debugging.
"""

from __future__ import annotations

import logging

from hydra.core.hydra_config import HydraConfig

MOST_RECORDS = 1000
"""Messages kept for a `train.log` that is not open yet."""


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
