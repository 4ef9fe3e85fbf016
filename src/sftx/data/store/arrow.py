"""Arrow arrays from numpy's and back, without copies.

`pa.array` and `to_numpy` would load pandas where that is installed, which takes half a second.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa


def to_arrow(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    """Return numbers, or rows of bytes, as Arrow holds them."""
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])


def to_binary(values: Sequence[bytes]) -> pa.Array:
    """Return byte strings as Arrow holds them."""
    return pa.Array.from_buffers(
        pa.binary(),
        len(values),
        [None, pa.py_buffer(offsets([len(v) for v in values])), pa.py_buffer(b"".join(values))],
    )


def to_lists(lengths: np.ndarray, values: pa.Array) -> pa.Array:
    """Return lists of some lengths, whose values follow each other."""
    return pa.ListArray.from_arrays(to_arrow(offsets(lengths), pa.int32()), values)


def offsets(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return where each of some parts begins, and where the last one ends."""
    return np.cumsum([0, *lengths], dtype=np.int32)


def numbers(array: pa.Array, dtype: np.typing.DTypeLike) -> np.ndarray:
    """Return the numbers that an Arrow array holds, where they lie."""
    data, kind = array.buffers()[1], np.dtype(dtype)
    if data is None or not len(array):
        return np.zeros(0, kind)
    return np.frombuffer(data, kind, len(array), array.offset * kind.itemsize)


def column(chunks: Sequence[pa.Array], dtype: np.typing.DTypeLike) -> np.ndarray:
    """Return the numbers of a column's chunks as one array."""
    return np.concatenate([np.zeros(0, dtype), *(numbers(chunk, dtype) for chunk in chunks)])
