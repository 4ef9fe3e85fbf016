"""Memory: kept by the C library from step to step; where it does not suffice, the micro-batch is halved."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from sftx.config.derive import largest_divisor, sequences_per_device
from sftx.data.batches.collate import Batch
from sftx.errors import TrainingError, is_out_of_memory
from sftx.terminal import counted

if TYPE_CHECKING:
    from sftx.training.trial import Session, Trial

log = logging.getLogger("sftx")
SMALLER = (
    "gradient_checkpointing=true, mode=qlora and bf16=true need less memory, and so does a smaller max_seq_length."
)

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Names of mallopt(3)."""
NEVER = -1
LARGEST = 2**30
"""Bytes of the largest block that is kept."""


@contextmanager
def memory_explained() -> Iterator[None]:
    """Turn a lack of memory outside the steps (loading, evaluating, the optimizer's state) into a short message."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or ["no memory"])[0]
        raise TrainingError(f"out of memory: {reason} {SMALLER}") from error


def place_of(batch: Batch) -> str:
    """Name the row of a micro-batch that needs most."""
    row = batch.origins[batch.longest] if batch.origins else "a row"
    rows = f"a micro-batch of {len(batch.lengths)} rows, the longest" if len(batch.lengths) > 1 else "a row"
    return f"{rows} of {max(batch.lengths)} tokens ({row})"


def shrink(session: Session, trial: Trial, failed: Batch | None, longest: Sequence[int]) -> None:
    """Halve the micro-batch and open the feed anew: the step is made again, with the same sequences.

    `longest` holds for each rank the tokens of the longest row of the micro-batch that did not fit, or 0;
    `failed` is this rank's.

    Raises:
        TrainingError: it is not `auto`, or cannot be halved.
    """
    rank = max(range(len(longest)), key=lambda r: longest[r])
    where = place_of(failed) if failed else f"rank {rank}'s micro-batch, whose longest row has {longest[rank]} tokens"
    what = f"step {trial.step + 1}: out of memory at {where}."
    config, before = trial.config, trial.micro_batch
    if session.engine.sharded:
        raise TrainingError(f"{what} Set a smaller per_device_train_batch_size. {SMALLER}")
    if config.per_device_train_batch_size != "auto":
        smaller = "" if before == 1 else "Set per_device_train_batch_size=auto, which halves it where needed. "
        raise TrainingError(f"{what} {smaller}{SMALLER}")
    if before == 1:
        raise TrainingError(f"{what} It is alone in its micro-batch already. {SMALLER}")
    sequences = sequences_per_device(config)
    trial.micro_batch = largest_divisor(sequences, before // 2)
    trial.stepper.discard()
    if session.engine.device.type == "cuda":
        torch.cuda.empty_cache()
    session.saver.wait(trial)  # loader processes are started, which no other thread must see
    trial.open_feed(session)
    now = f"micro-batches of {counted(trial.micro_batch, 'sequence')}, {sequences // trial.micro_batch} per step"
    log.warning("%s From now on %s; a step's sequences stay the same.", what, now)
    trial.effective.settings["micro_batch"] = trial.micro_batch
    trial.effective.fall_back("per_device_train_batch_size", "auto", str(trial.micro_batch), what)
    if session.engine.is_main:
        trial.folder.update(effective=trial.effective.facts())


def keep_freed_memory() -> bool:
    """Let freed memory be used again instead of given back to the system; return True if it is.

    glibc gives large blocks back at once, and so each step waits for the system to empty the same pages again:
    one part in twenty of the time of training on a CPU. The most memory that a run holds stays the same.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library, or none to ask
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST) and mallopt(M_TRIM_THRESHOLD, NEVER))
