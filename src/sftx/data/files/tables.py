"""Parquet and Arrow to rows: batches of values as they stand, each row with its number from 1."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sftx.data.files.blob import Blob
from sftx.errors import DataError

BATCH = 512
ARROW_FILE = b"ARROW1"
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


@contextmanager
def open_table(blob: Blob, kind: str) -> Iterator[tuple[list[str], Iterator[dict[str, object]]]]:
    """Open a Parquet or Arrow file as its columns' names and its rows; raises DataError when it is damaged."""
    import pyarrow as pa  # heavy: only who needs it pays for it

    word = {"parquet": "Parquet", "arrow": "Arrow"}[kind]
    with on_disk(blob) as path:
        try:
            names, batches = _parquet(path) if kind == "parquet" else _arrow(path)
            yield names, (row for batch in batches for row in _rows(batch, names))
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise DataError(f"{blob.path}: cannot be read: {error.strerror or error}") from error
            what = str(error).split("\n")[0].rstrip(".")
            raise DataError(f"{blob.path}: is not a valid {word} file: {what}; write or copy it again") from error


@contextmanager
def on_disk(blob: Blob) -> Iterator[Path]:
    """Unpack what is compressed: these formats are read from several places."""
    if blob.compression is None:
        blob.head(1)  # a file that cannot be opened is reported the same way for all formats
        yield blob.path
        return
    with tempfile.NamedTemporaryFile(prefix="sftx-") as copy:
        with blob.open() as file:
            shutil.copyfileobj(file, copy)
        copy.flush()
        yield Path(copy.name)


def _parquet(path: Path) -> tuple[list[str], Iterator[Any]]:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path, memory_map=True, pre_buffer=False)
    return list(file.schema_arrow.names), file.iter_batches(batch_size=BATCH)


def _arrow(path: Path) -> tuple[list[str], Iterator[Any]]:
    import pyarrow as pa

    with path.open("rb") as file:
        is_file = file.read(len(ARROW_FILE)) == ARROW_FILE
    source = pa.memory_map(str(path)) if path.stat().st_size else pa.BufferReader(b"")
    if is_file:
        reader = pa.ipc.open_file(source)
        return list(reader.schema.names), (reader.get_batch(i) for i in range(reader.num_record_batches))
    stream = pa.ipc.open_stream(source)
    with path.open("rb") as file:
        file.seek(-len(END_OF_STREAM), os.SEEK_END)
        if file.read() != END_OF_STREAM:  # Arrow takes a stream cut off between two batches for a whole one
            raise pa.ArrowInvalid("the stream is cut off")
    return list(stream.schema.names), iter(stream)


def _rows(batch: Any, names: list[str]) -> Iterator[dict[str, object]]:
    import pyarrow as pa

    nested = any(pa.types.is_nested(column.type) for column in batch.columns)
    for start in range(0, batch.num_rows, BATCH):
        columns = [column.to_pylist() for column in batch.slice(start, BATCH).columns]
        for values in zip(*columns, strict=True):
            row = dict(zip(names, values, strict=True))
            yield without_filled(row) if nested else row


def without_filled(row: dict[str, Any]) -> dict[str, object]:
    """Return a row without the nulls inside its objects.

    In a column all objects have the same names, so Parquet and Arrow fill in as null each that only other rows have.
    A null argument of a call is kept where the tool's definition in the same row requires that argument.
    """
    required: dict[str, list[str]] | None = None

    def kept(value: Any, names: Sequence[str] = ()) -> Any:
        nonlocal required
        if isinstance(value, list):
            return [kept(one) for one in value]
        if not isinstance(value, dict):
            return value
        found = {name: kept(one) for name, one in value.items() if one is not None or name in names}
        arguments = value.get("arguments")
        if isinstance(arguments, dict) and None in arguments.values():
            required = _required_arguments(list(row.values())) if required is None else required
            found["arguments"] = kept(arguments, required.get(value.get("name", ""), ()))
        return found

    return {name: kept(value) for name, value in row.items()}


def _required_arguments(value: Any) -> dict[str, list[str]]:
    """Return the arguments that the definitions of tools inside a value require, by the tool's name."""
    if isinstance(value, str) and '"required"' in value:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return {}
    if isinstance(value, list):
        return {name: names for one in value for name, names in _required_arguments(one).items()}
    if not isinstance(value, dict):
        return {}
    parameters = value.get("parameters")
    if isinstance(parameters, dict):
        return {str(value.get("name")): parameters.get("required") or []}
    return _required_arguments(list(value.values()))


def unwritable(value: object) -> str | None:
    """Name the type of a value that JSON has no word for, anywhere inside; None when there is none."""
    if isinstance(value, float):
        return None if math.isfinite(value) else "a number that is not finite"
    if value is None or isinstance(value, str | bool | int):
        return None
    if isinstance(value, list | tuple):
        return next((found for one in value if (found := unwritable(one))), None)
    if isinstance(value, dict):
        return next((found for one in value.values() if (found := unwritable(one))), None)
    return f"a {type(value).__name__}"
