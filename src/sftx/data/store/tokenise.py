"""Records to blocks of rows, in several processes; the blocks are the same however many there are."""

from __future__ import annotations

import gc
import os
import signal
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context
from multiprocessing.process import BaseProcess

from sftx.data.encode.policy import EncodePolicy
from sftx.data.encode.row import Row
from sftx.data.encode.template import ChatTemplate
from sftx.data.records.record import Record
from sftx.data.store.token_store import Block, to_batch
from sftx.errors import ConfigError, SftxError
from sftx.processes import serve_parent

CHUNK = 500
"""Records of a block."""
ALONE = 2000
"""Fewer records than this are tokenised in this process: starting others would cost more."""
MOST_WORKERS = 8


def worker_count(requested: int | None, records: int) -> int:
    """Return how many processes tokenise beside this one; None is one for each core, eight at most.

    Raises:
        ConfigError: a negative number was requested.
    """
    if requested is not None and requested < 0:
        raise ConfigError(f"`data.num_workers`: expected null or an integer >= 0, got {requested}.")
    if records < ALONE:
        return 0
    if requested is None:
        cores = len(os.sched_getaffinity(0))
        requested = min(cores, MOST_WORKERS) if cores > 1 else 0
    return min(requested, -(-records // CHUNK))


def encode_blocks(
    records: Sequence[Record], template: ChatTemplate, policy: EncodePolicy, workers: int | None = None
) -> Generator[Block]:
    """Yield the corpus's blocks in order; close the iterator to end the processes early.

    Raises:
        SftxError: the template or the policy refuses a record, or a worker ended.
        ConfigError: a negative number was requested.
    """
    chunks = [range(at, min(at + CHUNK, len(records))) for at in range(0, len(records), CHUNK)]
    count = worker_count(workers, len(records))
    with _without_threads():
        if count:
            yield from _in_workers(records, template, policy, chunks, count)
        else:
            for chunk in chunks:
                yield encode_chunk(records, template, policy, chunk)


def encode_chunk(records: Sequence[Record], template: ChatTemplate, policy: EncodePolicy, chunk: range) -> Block:
    """Return the block of some records."""
    rows: list[Row] = []
    indices: list[int] = []
    skipped: list[tuple[int, str]] = []
    for index, encoded in zip(chunk, template.encode_batch([records[i] for i in chunk], policy), strict=True):
        if isinstance(encoded, str):
            skipped.append((index, encoded))
        else:
            rows += encoded
            indices += [index] * len(encoded)
    return Block(to_batch(rows, indices), skipped)


@contextmanager
def _without_threads() -> Iterator[None]:
    """Let the tokenizer start no threads: a forked process could hang on them."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _in_workers(
    records: Sequence[Record], template: ChatTemplate, policy: EncodePolicy, chunks: Sequence[range], count: int
) -> Iterator[Block]:
    """Encode chunks in forked processes, which share this one's tokenizer and records."""
    others = set(active_children())
    pool = ProcessPoolExecutor(count, get_context("fork"), _start_worker, (records, template, policy))
    workers: set[BaseProcess] = set()
    pending: deque[Future[Block]] = deque()
    try:
        for chunk in chunks:
            pending.append(pool.submit(_encode, chunk))
            workers = workers or set(active_children()) - others
            if len(pending) > 2 * count:  # what is done and not yet written stays in memory
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        _kill(workers)
        pool.shutdown()
        raise _ended(workers) from error
    except BaseException:
        _kill(workers)
        raise
    finally:
        pool.shutdown(cancel_futures=True)


_job: tuple[Sequence[Record], ChatTemplate, EncodePolicy]
"""What this worker process encodes."""


def _start_worker(*job: object) -> None:
    global _job
    serve_parent()
    gc.freeze()  # the collector would touch, and so copy, every page that is shared with the parent
    _job = job  # type: ignore[assignment]


def _encode(chunk: range) -> Block:
    return encode_chunk(*_job, chunk)


def _kill(workers: set[BaseProcess]) -> None:
    for worker in workers:
        worker.kill()


def _ended(workers: set[BaseProcess]) -> SftxError:
    """Return the error of a pool of which a worker ended: by itself, where the others were killed."""
    status = next((w.exitcode for w in workers if w.exitcode not in (None, -signal.SIGKILL)), -signal.SIGKILL)
    how = f"was killed by signal {-status}" if status < 0 else f"ended with exit code {status}"
    return SftxError(
        f"a tokenizer worker {how}; its results were discarded. If memory ran out, use fewer workers: "
        "data.num_workers=2, or 0 to tokenise in the training process."
    )
