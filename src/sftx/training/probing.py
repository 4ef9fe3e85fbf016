"""Before the first step: which fast paths a model can take is tried, not assumed, and recorded in each trial."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from sftx.config.schema import TrainConfig
from sftx.errors import ConfigError
from sftx.model.attention import VARLEN, attend_row_by_row, use_varlen
from sftx.model.compiled import compile_blocks, limits_noticed, missing_for_compiling
from sftx.model.cross_entropy import use_kernel
from sftx.model.fused import use_liger
from sftx.model.rotation import rotate_lean, use_rotation
from sftx.training.trial import Session, Trial
from sftx.training.tried import Tried, documents_leak, last_block_shortened

log = logging.getLogger("sftx")


def probe(config: TrainConfig, session: Session, trials: Sequence[Trial]) -> None:
    """Find out by trying which fast paths give the model's own results, and take those."""
    attend_row_by_row()
    lean = None if config.compile or session.engine.sharded else rotate_lean
    use_rotation(session.model.module, session.engine.device, session.numerics.dtype, lean)
    if session.engine.device.type == "cuda":
        use_kernels(config, session, trials)
    tried = Tried(session.model, session.numerics, session.engine.device)
    session.flat = _padding_free(config, session, trials, tried)
    session.model.loss_head = tried.loss_head()
    if not config.compile:  # what it leaves out would be compiled anew for every batch
        session.model.keeps_early = last_block_shortened(tried)


def use_kernels(config: TrainConfig, session: Session, trials: Sequence[Trial]) -> None:
    """Let one kernel do what several operations do, where that gives the same and takes no longer."""
    device, dtype = session.engine.device, session.numerics.dtype
    vocabulary = session.model.module.config.get_text_config().vocab_size
    reasons = {"cross entropy": use_kernel(device, dtype, vocabulary)}
    if not (config.compile or session.engine.sharded):
        reasons |= use_liger(session.model.module, device, dtype)
    for trial in trials:
        trial.effective.settings["kernels"] = [name for name, reason in reasons.items() if reason is None]
        for name, reason in reasons.items():
            if reason is not None:
                trial.effective.remark(f"{name}: no kernel of its own, {reason}.")


def _padding_free(config: TrainConfig, session: Session, trials: Sequence[Trial], tried: Tried) -> bool:
    """Return True if batches are padding-free, for which the model must prove that it keeps rows apart.

    Raises:
        ConfigError: rows were to be packed, and the model does not keep them apart.
    """
    if config.batching not in ("padding_free", "packed"):
        return False
    sdpa = trials[0].effective.settings["attn_implementation"] == "sdpa"
    if config.attn_implementation == "auto" and sdpa and session.engine.device.type == "cuda":
        reason = use_varlen(session.model.module.config, session.engine.device, session.numerics.dtype)
        for trial in trials:
            trial.effective.settings["attn_implementation"] = "sdpa" if reason else VARLEN
            if reason:
                trial.effective.fall_back("attn_implementation", VARLEN, "sdpa, one call per row", reason)
    reason = documents_leak(tried)
    if reason is None:
        return True
    if config.batching == "packed":
        raise ConfigError(f"`batching=packed`: this model cannot keep rows apart: {reason}. Use batching=padded.")
    for trial in trials:
        trial.effective.fall_back("batching", "padding_free", "padded", f"this model cannot keep rows apart: {reason}")
    return False


def compile_model(config: TrainConfig, session: Session, trials: Sequence[Trial]) -> None:
    """Compile the model's blocks where that is asked for and can be."""
    if not config.compile:
        return
    reason = missing_for_compiling(session.engine.device, sharded=session.engine.sharded)
    if reason is None:
        eager = trials[0].effective.settings["attn_implementation"] == "eager"
        compile_blocks(session.model, "eager" if eager else "sdpa", len(trials))
    for trial in trials:
        trial.effective.settings["compile"] = reason is None
        if reason is not None:
            trial.effective.fall_back("compile", "true", "false", reason)


@contextmanager
def compile_limits_noted(session: Session, trials: Sequence[Trial]) -> Iterator[None]:
    """Record inside the block where torch compiles a function for no more inputs: others of them run uncompiled."""

    def note(function: str) -> None:
        reason = f"torch compiled {function} as often as it may, and runs it uncompiled for other inputs"
        log.warning("compile=true: %s", reason)
        for trial in trials:
            trial.effective.settings["compile"] = "in part"
            trial.effective.fall_back("compile", "true", "in part", reason)
            if session.engine.is_main:
                trial.folder.update(effective=trial.effective.facts())

    with limits_noticed(note):
        yield
