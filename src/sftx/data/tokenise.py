"""Records to blocks of rows, in several processes; the blocks are the same however many there are."""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from multiprocessing.connection import Connection, Pipe, wait

from sftx.data.block import Block
from sftx.data.policy import EncodePolicy
from sftx.data.record import Record
from sftx.data.template import ChatTemplate
from sftx.data.worker import Job, encode_chunk
from sftx.errors import ConfigError, SftxError

log = logging.getLogger("sftx")
CHUNK = 1000
"""Records that a process is asked for at a time."""
ALONE = 2000
"""Fewer records than this are tokenised in this process: starting others would cost more."""
START_SECONDS = 3.0
"""... and so is a corpus that, by how its first chunk went, takes this process no longer."""
MOST_WORKERS = 8
HELD_TOKENS = 1 << 24
"""So many tokens may wait for their turn to be written; beyond, only who holds the next ones is heard."""
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), "1")


def worker_count(asked: int | None, records: int) -> int:
    """Return how many processes tokenise beside this one; None is one for each core, eight at most.

    Errors:
        ConfigError: fewer than none were asked for.
    """
    if asked is not None and asked < 0:
        raise ConfigError(f"`data.num_workers`: expected null or an integer >= 0, got {asked}.")
    if records < ALONE:
        return 0
    if asked is None:
        cores = len(os.sched_getaffinity(0))
        asked = min(cores, MOST_WORKERS) if cores > 1 else 0
    return min(asked, -(-records // CHUNK))


def encode_blocks(
    records: Sequence[Record], template: ChatTemplate, policy: EncodePolicy, workers: int | None = None
) -> Generator[Block, None, None]:
    """Yield the corpus's blocks in order; close the iterator to end the processes early.

    Errors:
        SftxError: what the template or the policy says of a record; or a process was ended.
        ConfigError: fewer processes than none were asked for.
    """
    chunks = [range(at, min(at + CHUNK, len(records))) for at in range(0, len(records), CHUNK)]
    job = Job.of(template, policy, records)
    count = worker_count(workers, len(records))
    if count and workers is None:
        started = time.thread_time()
        yield from _here(job, chunks[:1])
        chunks = chunks[1:]
        if (time.thread_time() - started) * len(chunks) < START_SECONDS:
            count = 0
    try:
        pool = _Workers(job, count) if count else None
    except _CannotLeaveError as error:
        log.info("tokenising in this process, since another cannot be told what to do (%s)", error)
        pool = None
    if pool is None:
        yield from _here(job, chunks)
        return
    with closing(pool):
        yield from pool.blocks(chunks)


def _here(job: Job, chunks: Sequence[range]) -> Iterator[Block]:
    template = job.template()  # made as the others make theirs, so that the tokens are the same
    with _without_threads():
        for chunk in chunks:
            yield from encode_chunk(template, job.records, job.policy, chunk)


class _CannotLeaveError(Exception):
    """The tokenizer or the records cannot be sent to another process."""


def _packed(job: Job) -> bytes:
    try:
        return pickle.dumps(job)
    except Exception as error:
        raise _CannotLeaveError(str(error)) from error


@contextmanager
def _without_threads() -> Iterator[None]:
    """Let the tokenizer start no threads: processes that are forked later could hang on them."""
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


class _Workers:
    """Processes that encode chunks of one corpus."""

    def __init__(self, job: Job, count: int) -> None:
        packed = _packed(job)
        pairs = [Pipe() for _ in range(count + 1)]
        self._control, *self._connections = (ours for ours, _ in pairs)
        theirs = [end.fileno() for _, end in pairs]
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from sftx.data.worker import main; main()", *map(str, theirs)],
            env=os.environ
            | ONE_THREAD
            | {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            pass_fds=theirs,
            stdin=subprocess.DEVNULL,
            stdout=2,  # what a library prints is for people
            process_group=0,  # Ctrl-C comes to this process, which ends the others
        )
        for _, end in pairs:
            end.close()
        try:
            self._control.send_bytes(packed)
            answer = self._control.recv()
        except (EOFError, OSError) as error:
            self.close()
            raise _ended(self._process.returncode) from error
        except BaseException:
            self.close()
            raise
        if answer is not None:
            self.close()
            raise _CannotLeaveError(answer) if isinstance(answer, str) else answer

    def blocks(self, chunks: Sequence[range]) -> Iterator[Block]:
        """Yield the blocks of all chunks, in order."""
        self._chunks = chunks
        self._parts: list[deque[Block | Exception | None]] = [deque() for _ in chunks]
        self._asked: dict[Connection, deque[int]] = {c: deque() for c in self._connections}
        self._next, self._held = 0, 0
        for current in range(len(chunks)):
            while (part := self._part(current)) is not None:
                if isinstance(part, Exception):
                    raise part
                self._held -= len(part.ids_N)
                yield part

    def _part(self, current: int) -> Block | Exception | None:
        """Return what comes next of a chunk, None at its end, hearing of others meanwhile."""
        while not self._parts[current]:
            self._ask(current)
            busy = [c for c, numbers in self._asked.items() if numbers]
            if self._held >= HELD_TOKENS:
                busy = [c for c in busy if current in self._asked[c]]
            for connection in wait(busy):
                assert isinstance(connection, Connection)
                part = self._heard(connection)
                self._parts[self._asked[connection][0]].append(part)
                if isinstance(part, Block):
                    self._held += len(part.ids_N)
                else:
                    self._asked[connection].popleft()
        return self._parts[current].popleft()

    def _ask(self, current: int) -> None:
        """Give each process one chunk to work on and one to go on with, none too far ahead."""
        last = min(len(self._chunks), current + 4 * len(self._connections))
        for depth in (1, 2):
            for connection, numbers in self._asked.items():
                if self._next < last and len(numbers) < depth:
                    try:
                        connection.send(self._chunks[self._next])
                    except OSError as error:
                        raise self._death(connection) from error
                    numbers.append(self._next)
                    self._next += 1

    def _heard(self, connection: Connection) -> Block | Exception | None:
        try:
            return connection.recv()
        except (EOFError, OSError) as error:
            raise self._death(connection) from error

    def _death(self, connection: Connection) -> SftxError:
        """Return what is to be said of a process that is gone."""
        status = None
        with suppress(EOFError, OSError):
            self._control.send(self._connections.index(connection))
            status = self._control.recv()
        return _ended(status)

    def close(self) -> None:
        """End all processes."""
        for connection in (self._control, *self._connections):
            connection.close()
        try:
            self._process.wait(timeout=20)
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise


def _ended(status: int | None) -> SftxError:
    how = "ended early" if status is None else f"ended with exit code {status}"
    if status is not None and status < 0:
        how = f"was killed by signal {-status}"
    return SftxError(
        f"a tokenizer worker {how}; its results were discarded. If memory ran out, use fewer workers: "
        "data.num_workers=2, or 0 to tokenise in the training process."
    )
