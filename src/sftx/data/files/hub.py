"""Datasets of the Hugging Face hub: `org/name`, `org/name:split`, `org/name/config:split`."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sftx.errors import DataError

HUB_ID = re.compile(
    r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:/(?P<config>[A-Za-z0-9][\w.-]*))?(?::(?P<split>[\w.-]+))?",
    re.ASCII,
)
SPLIT = "train"
"""The split that is read unless one is named."""
PATIENCE = 5.0
"""Seconds the hub has to answer at all; the clients' own retries take half a minute."""


def hub_files(name: str, spelled: str) -> list[Path]:
    """Return the Arrow files of a dataset, fetched or kept from an earlier time; `spelled` is how it was named.

    Raises:
        DataError: `datasets` is not installed, there is no such dataset or split, or no way to the hub.
    """
    files = [Path(str(f["filename"])) for f in _load(name, spelled, streaming=False).cache_files]
    if not files:
        raise DataError(f"{spelled}: it left no file; save it with save_to_disk and name that folder.")
    return files


def hub_rows(name: str, spelled: str) -> Iterator[dict[str, Any]]:
    """Yield a dataset's rows as they come, keeping none.

    Raises:
        DataError: as `hub_files`; or the connection is lost for good.
    """
    rows, number = iter(_load(name, spelled, streaming=True)), 0
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # whatever the network and a dataset's reader raise
            raise DataError(
                f"{spelled}: row {number + 1} cannot be had: {_first_line(error)}. Run the same command again: it "
                "goes on at the last checkpoint."
            ) from error
        if row is None:
            return
        number += 1
        yield row


def _load(name: str, spelled: str, *, streaming: bool) -> Any:
    parts = HUB_ID.fullmatch(name)
    assert parts is not None
    begun = f"{spelled}: no such file or folder, and as a dataset of the hub it cannot be read: "
    try:
        from datasets import load_dataset  # heavy, and an extra
    except ImportError as error:
        raise DataError(f"{begun}install the extra for that: pip install 'sftx[datasets]'.") from error
    config, split = parts["config"], parts["split"] or SPLIT
    endpoint = _unreachable()
    how = {"streaming": True} if streaming else {}
    try:
        with _offline(endpoint is not None):
            return load_dataset(parts["id"], *([config] if config else []), split=split, **how)
    except Exception as error:
        if endpoint is not None:
            raise DataError(
                f"{begun}{endpoint} does not answer, and no copy is kept from an earlier time. Set HF_ENDPOINT to a "
                "mirror, or download it where there is a network (save_to_disk, or its Parquet files) and name that "
                "folder or file."
            ) from error
        wanted = "Expected org/name, org/name:split or org/name/config:split"
        raise DataError(f"{begun}{_first_line(error)}. {wanted}.") from error


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).strip().split("\n") if line.strip()]
    return lines[0][:300].rstrip(".") if lines else type(error).__name__


def _unreachable() -> str | None:
    """Return the hub's address when it does not answer, or must not be contacted (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "the hub (HF_HUB_OFFLINE is set)"
    try:
        with urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=PATIENCE):
            return None
    except urllib.error.HTTPError:  # an answer
        return None
    except (OSError, ValueError) as error:
        # What the clients trust may differ from what Python trusts.
        return None if "CERTIFICATE" in str(error).upper() else str(constants.ENDPOINT)


@contextmanager
def _offline(wanted: bool) -> Iterator[None]:
    """Have the clients look only at what they keep."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if wanted:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
