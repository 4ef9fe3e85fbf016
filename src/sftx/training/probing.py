"""Before the first step: what the model can do is probed, and recorded in each trial."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from sftx.config.schema import TrainConfig
from sftx.effective import Effective
from sftx.errors import ConfigError
from sftx.model.kernels.attention import VARLEN
from sftx.model.kernels.compiled import compile_blocks, limits_noticed, missing_for_compiling
from sftx.model.probe import LIGER, TRITON, Probed
from sftx.model.probe import probe as probe_model
from sftx.training.trial import Session, Trial

log = logging.getLogger("sftx")


def probe(config: TrainConfig, session: Session, trials: Sequence[Trial], pinned: Sequence[str] | None = None) -> None:
    """Find out what the model can do, let it use the kernels that give its own results, and record both in each trial.

    Raises:
        ConfigError: rows were to be packed, and the model does not keep them apart.
    """
    on_gpu = session.engine.device.type == "cuda"
    padding_free = config.batching in ("padding_free", "packed")
    sdpa = config.attn_implementation == "auto" and trials[0].effective.settings["attn_implementation"] == "sdpa"
    kernels = [VARLEN] if on_gpu and padding_free and sdpa else []
    if on_gpu:
        kernels += [TRITON] if config.compile or session.engine.sharded else [TRITON, LIGER]
    found = probe_model(
        session.model,
        session.numerics,
        session.engine.device,
        padding_free=padding_free,
        kernels=kernels,
        pinned=pinned,
        from_main=session.engine.from_main,
    )
    if found.documents_leak and config.batching == "packed":
        raise ConfigError(
            f"`batching=packed`: this model cannot keep rows apart: {found.documents_leak}. Use batching=padded."
        )
    session.padding_free = padding_free and found.documents_leak is None
    for trial in trials:
        _record(found, trial.effective)


def _record(found: Probed, effective: Effective) -> None:
    effective.settings["kernels"] = found.kernels
    if VARLEN in found.kernels:
        effective.settings["attn_implementation"] = VARLEN
    for name, reason in found.unusable.items():
        if name == VARLEN:
            effective.fall_back("attn_implementation", VARLEN, "sdpa, one call per row", reason)
        else:
            effective.remark(f"{name}: without its kernel, {reason}.")
    if found.documents_leak:
        reason = f"this model cannot keep rows apart: {found.documents_leak}"
        effective.fall_back("batching", "padding_free", "padded", reason)


def compile_model(config: TrainConfig, session: Session, trials: Sequence[Trial]) -> None:
    """Compile the model's blocks where that is asked for and can be."""
    if not config.compile:
        return
    reason = missing_for_compiling(session.engine.device, sharded=session.engine.sharded)
    if reason is None:
        compile_blocks(session.model, trials[0].effective.settings["attn_implementation"], len(trials))
    for trial in trials:
        trial.effective.settings["compile"] = reason is None
        if reason is not None:
            trial.effective.fall_back("compile", "true", "false", reason)


@contextmanager
def compile_limits_noted(session: Session, trials: Sequence[Trial]) -> Iterator[None]:
    """Record inside the block which functions reach torch's recompile limit: other inputs of theirs run uncompiled."""

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
