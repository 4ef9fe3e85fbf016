"""Rows to an Arrow file: ids and the spans of tokens that carry loss; all else is in the records they came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sftx.data.encode.policy import EncodePolicy
from sftx.data.encode.row import Row
from sftx.data.encode.template import ChatTemplate
from sftx.data.store.arrow import to_arrow, to_lists
from sftx.data.store.cache import SKIPPED

DATA_VERSION = 4
"""Part of every key: raise it when the same records would become other rows, or a store another form."""
ROWS = "rows.arrow"
SPAN = pa.struct([("start", pa.int32()), ("end", pa.int32()), ("weight", pa.float32())])
SCHEMA = pa.schema(
    [
        ("ids", pa.list_(pa.int32())),
        ("supervised_spans", pa.list_(SPAN)),
        ("record", pa.int64()),
        ("length", pa.int32()),
        ("full_length", pa.int32()),
        ("loss_weight", pa.float64()),
        ("supervised", pa.int32()),
    ]
)


@dataclass
class Block:
    """Some rows that follow each other, and why other records have none: the form in which workers send them."""

    rows: pa.RecordBatch
    skipped: list[tuple[int, str]] = field(default_factory=list)
    """(record, reason)."""


def token_key(corpus: str, count: int, template: ChatTemplate, policy: EncodePolicy) -> str:
    """Return the key of the rows that a template makes of the first `count` records of a corpus."""
    tokenizer = template.tokenizer
    parts = {
        "version": DATA_VERSION,
        "libraries": {name: version(name) for name in ("tokenizers", "transformers", "jinja2")},
        "corpus": corpus,
        "records": count,
        # As it is used: whichever files it came from, and with what loading made of them.
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode("utf-8", "surrogatepass")).hexdigest(),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "template": template.source,
        "stop_tokens": list(template.stop_tokens),
        "date": template.date,
        "policy": asdict(policy),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def to_batch(rows: Sequence[Row], records: Sequence[int]) -> pa.RecordBatch:
    """Return rows as a record batch; `records` are the indices in the corpus of the records they came from."""
    count = len(rows)
    lengths_R = np.fromiter((len(row.ids_T) for row in rows), np.int32, count)
    starts_S, ends_S, weights_S, spans_R = _spans([row.weights_T for row in rows], lengths_R)
    spans = pa.StructArray.from_arrays(
        [to_arrow(starts_S, pa.int32()), to_arrow(ends_S, pa.int32()), to_arrow(weights_S, pa.float32())],
        fields=list(SPAN),
    )
    columns = [
        to_lists(lengths_R, to_arrow(_joined([row.ids_T for row in rows], np.int32), pa.int32())),
        to_lists(spans_R, spans),
        to_arrow(np.asarray(records, np.int64), pa.int64()),
        to_arrow(lengths_R, pa.int32()),
        to_arrow(np.fromiter((row.full_length for row in rows), np.int32, count), pa.int32()),
        to_arrow(np.fromiter((row.loss_weight for row in rows), np.float64, count), pa.float64()),
        to_arrow(np.fromiter((row.supervised_tokens for row in rows), np.int32, count), pa.int32()),
    ]
    return pa.record_batch(columns, schema=SCHEMA)


def write_rows(folder: Path, blocks: Iterable[Block]) -> dict[str, Any]:
    """Write blocks, in the order they come, into a folder; return what `sftx data cache ls` shows of them."""
    rows = tokens = 0
    with (
        pa.OSFile(str(folder / ROWS), "wb") as sink,
        pa.ipc.new_file(sink, SCHEMA) as writer,
        (folder / SKIPPED).open("w", encoding="utf-8", newline="\n") as skipped,
    ):
        for block in blocks:
            for record, reason in block.skipped:
                skipped.write(json.dumps([record, reason], ensure_ascii=False) + "\n")
            if block.rows.num_rows:
                writer.write_batch(block.rows)
                rows += block.rows.num_rows
                tokens += len(block.rows.column("ids").values)
    return {"rows": rows, "tokens": tokens}


def _joined(parts: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(0, dtype)


def _spans(weights: Sequence[np.ndarray], lengths_R: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return start, end and weight of each run of equal weights other than 0, and how many each row has."""
    weights_N = _joined(weights, np.float32)
    row_starts_R = np.cumsum(lengths_R, dtype=np.int64) - lengths_R
    begins_N = np.ones(len(weights_N), dtype=bool)
    begins_N[1:] = weights_N[1:] != weights_N[:-1]
    begins_N[row_starts_R[lengths_R > 0]] = True  # a run ends with its row
    starts = np.flatnonzero(begins_N)
    ends = np.append(starts[1:], len(weights_N))[: len(starts)]
    weighs = weights_N[starts] != 0
    starts, ends = starts[weighs], ends[weighs]
    row_of = np.searchsorted(row_starts_R + lengths_R, starts, side="right")
    spans_R = np.bincount(row_of, minlength=len(lengths_R)).astype(np.int32)
    first = row_starts_R[row_of]
    return (starts - first).astype(np.int32), (ends - first).astype(np.int32), weights_N[starts], spans_R
