"""The processes that tokenise.

One is started afresh and told the tokenizer, the template and where the records are; the others are
forked from it, so that the tokenizer is loaded once and lies in memory once. It never runs a thread
before it forks, which is what makes forking safe here and not in a process that trains.
"""

from __future__ import annotations

import gc
import itertools
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from sftx.data.block import Block, Origin, Skipped, to_block
from sftx.data.policy import EncodePolicy
from sftx.data.record import Record
from sftx.data.rows import Row
from sftx.data.template import ChatTemplate
from sftx.errors import SftxError

BATCH = 1000
"""Records that go to the template at a time, at most."""
BATCH_LETTERS = 1 << 20
"""... and their letters: the next record waits when there are so many."""
BLOCK_TOKENS = 1 << 20
"""A block ends when it has so many tokens, and with its chunk."""

COLLECT = 8
"""Chunks after which a process looks for garbage."""


@dataclass(frozen=True)
class Job:
    """What a process must know to tokenise; the tokenizer goes as it is, with its pad token chosen."""

    tokenizer: Any
    source: str
    stop_tokens: list[str]
    date: str | None
    policy: EncodePolicy
    records: Sequence[Record]
    """Pickled once: a path for records that lie in a file."""

    @classmethod
    def of(cls, template: ChatTemplate, policy: EncodePolicy, records: Sequence[Record]) -> Job:
        """Return the job of encoding records with a template."""
        return cls(template.tokenizer, template.source, template.stop_tokens, template.date, policy, records)

    def template(self) -> ChatTemplate:
        """Make the template anew."""
        return ChatTemplate(self.tokenizer, self.source, self.stop_tokens, self.date)


def encode_chunk(
    template: ChatTemplate, records: Sequence[Record], policy: EncodePolicy, chunk: range
) -> Iterator[Block]:
    """Yield the blocks of the records in `chunk`; where they end depends on nothing but the records."""
    rows: list[Row] = []
    origins: list[Origin] = []
    skipped: list[Skipped] = []
    tokens = 0
    for batch in _batches(records, chunk):
        encodings = template.encode_batch([record for _, record in batch], policy)
        for (number, record), encoded in zip(batch, encodings, strict=True):
            if isinstance(encoded, str):
                skipped.append(Skipped(number, record.file, record.line, encoded, record.number))
                continue
            rows += encoded
            origins += [Origin(number, record.file, record.line, record.number)] * len(encoded)
            tokens += sum(len(row.ids_T) for row in encoded)
            if tokens >= BLOCK_TOKENS:
                yield to_block(rows, origins, skipped)
                rows, origins, skipped, tokens = [], [], [], 0
    if rows or skipped:
        yield to_block(rows, origins, skipped)


def _batches(records: Sequence[Record], chunk: range) -> Iterator[list[tuple[int, Record]]]:
    batch: list[tuple[int, Record]] = []
    letters = 0
    for number in chunk:
        record = records[number]
        batch.append((number, record))
        letters += sum(len(message.content) for message in record.messages)
        if len(batch) == BATCH or letters >= BATCH_LETTERS:
            yield batch
            batch, letters = [], 0
    if batch:
        yield batch


def main() -> None:
    """Load the tokenizer, fork a process for each connection but the first, and end with the first."""
    control, *ends = (Connection(int(word)) for word in sys.argv[1:])
    try:
        packed = control.recv_bytes()
    except (EOFError, OSError):  # whoever started this one has ended, perhaps amidst a message
        return
    try:
        job: Job = pickle.loads(packed)
    except Exception as error:  # noqa: BLE001 - a class of the caller's own script, for example
        control.send(f"{type(error).__name__}: {error}")
        return
    try:
        template = job.template()
        template.share_memory(len(ends))
    except Exception as error:  # noqa: BLE001 - raised again where the job came from
        control.send(_portable(error))
        return
    try:
        control.send(None)
    except OSError:
        return
    del packed
    gc.collect()
    gc.freeze()  # the collector would touch, and so copy, every page that is shared
    children = []
    for end in ends:
        child = os.fork()
        if child == 0:
            for other in (control, *ends):
                if other is not end:
                    other.close()  # or the end of one process would not be seen at the other side
            _work(template, job, end)
            os._exit(0)
        children.append(child)
    for end in ends:
        end.close()
    with suppress(EOFError, OSError):
        while True:
            status = os.waitpid(children[control.recv()], 0)[1]
            control.send(os.waitstatus_to_exitcode(status))
    for child in children:
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _work(template: ChatTemplate, job: Job, asked: Connection) -> None:
    """Encode what is asked for until the other side is gone; an error ends a chunk as None does."""
    gc.disable()  # next to nothing made here is garbage in a circle, and looking for it takes a tenth of the time
    with suppress(EOFError, OSError):
        for count in itertools.count(1):
            chunk = asked.recv()
            if count % COLLECT == 0:
                gc.collect()
            try:
                for block in encode_chunk(template, job.records, job.policy, chunk):
                    asked.send(block)
            except (BrokenPipeError, ConnectionResetError):
                return
            except Exception as error:  # noqa: BLE001 - raised again where the chunk came from
                asked.send(_portable(error))
            else:
                asked.send(None)


def _portable(error: Exception) -> Exception:
    """Return an error that another process can raise."""
    told = "".join(traceback.format_exception(error))
    if not isinstance(error, SftxError):
        error.add_note(f"In a process that tokenises:\n{told}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - whatever an error of someone else's has against it
        return RuntimeError(f"in a process that tokenises:\n{told}")
    return error
