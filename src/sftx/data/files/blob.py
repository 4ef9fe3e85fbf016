"""A file's bytes, a chunk at a time, whether or not they are compressed."""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from sftx.errors import DataError

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
CHUNK = 1 << 20
MAGICS = (
    (
        b"PK\x03\x04",
        "this is an Excel workbook or a zip file; name it *.xlsx or set data.format=xlsx, or save it as CSV",
    ),
    (b"\xd0\xcf\x11\xe0", "this is an old Excel or Word file (.xls, .doc); save it as CSV in UTF-8"),
    (b"%PDF", "this is a PDF; only tables of text can be read"),
    (b"\x1f\x8b", "this is compressed by gzip; name it *.gz"),
    (b"\x28\xb5\x2f\xfd", "this is compressed by zstd; name it *.zst"),
    (b"PAR1", "this is Parquet; name it *.parquet or set data.format=parquet"),
    (b"ARROW1", "this is Arrow; name it *.arrow or set data.format=arrow"),
)


@dataclass(frozen=True)
class Blob:
    """A file that can be read from its beginning any number of times."""

    path: Path
    compression: str | None = None

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Open the bytes inside; raises DataError when they cannot be read or unpacked."""
        try:
            with self._unpacked() as file:
                yield file
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise self._damaged(error) from error
        except OSError as error:
            if self.compression == "zstd" and error.errno is None:
                raise self._damaged(error) from error
            raise DataError(f"{self.path}: cannot be read: {error.strerror or error}") from error

    def chunks(self) -> Iterator[bytes]:
        """Yield all bytes inside."""
        with self.open() as file:
            while chunk := file.read(CHUNK):
                yield chunk

    def head(self, size: int) -> bytes:
        """Return the first bytes inside."""
        with self.open() as file:
            return file.read(size)

    def _damaged(self, error: Exception) -> DataError:
        return DataError(
            f"{self.path}: the {self.compression} file is damaged or cut off ({error}); compress or copy it again"
        )

    @contextmanager
    def _unpacked(self) -> Iterator[BinaryIO]:
        if self.compression == "gzip":
            with gzip.open(self.path) as packed:
                yield cast("BinaryIO", packed)
        elif self.compression == "zstd":
            import pyarrow as pa  # heavy: only who needs it pays for it

            with pa.CompressedInputStream(str(self.path), "zstd") as stream:
                yield cast("BinaryIO", io.BufferedReader(_Raw(stream), CHUNK))
        else:
            with self.path.open("rb") as file:
                yield file


class _Raw(io.RawIOBase):
    """Arrow's stream as Python's, which reads all that was asked for."""

    def __init__(self, stream: object) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        return self._stream.readinto(buffer)  # type: ignore[attr-defined]


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hex; raises DataError when it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
