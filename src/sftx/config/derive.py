"""What follows from the configuration and the data: pure functions, printed with their formula."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

from sftx.config.schema import TrainConfig
from sftx.config.trees import flat
from sftx.terminal import counted, differing

PATHS = {"output_dir", "train_file_path", "train_file_name", "eval_file_name", "model_name_or_path", "adapter"}
PRESENTATION = {
    "disable_tqdm", "logging_steps", "report_to", "tracker", "on_tracker_error", "callback", "resume",
    "save_steps", "save_strategy", "save_total_limit", "eval_steps", "dataloader_num_workers", "keep_best", "device",
    "allow_targets", "async_save", "lost_work_minutes", "final_dtype", "deterministic",
}  # fmt: skip
MACHINES = {"parallel", "gradient_accumulation_steps", "per_device_train_batch_size"}
UNMEASURED_TOKENS = 4096
LENGTH = {"num_train_epochs", "max_steps"}
SEQUENCES = "per_device_train_batch_size x gradient_accumulation_steps x processes"
"""The name in an identity of how many sequences make a step."""
RUNS = "outputs/runs"
"""Where a run without an `output_dir` has its folder, by date."""


@dataclass(frozen=True)
class Steps:
    """How long a run is, in optimizer steps, and how that was reckoned."""

    per_epoch: int | None
    """None when the rows of a pass are not known."""
    total: int
    formula: str


def derive_steps(config: TrainConfig, units: int | None, world_size: int) -> Steps:
    """Return the run's steps: whole passes over the rows (or packs of them), unless `max_steps` is set."""
    if units is None:
        assert config.max_steps is not None, "the rules ask for it"
        return Steps(None, config.max_steps, f"max_steps={config.max_steps} (streamed: a pass has no known length)")
    batch, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    per_epoch = -(-units // (sequences_per_device(config) * world_size))
    total = math.ceil(per_epoch * Fraction(str(config.num_train_epochs)))  # the number as it is written: 0.07 x 100 = 7
    ranks = f" x {world_size} ranks" if world_size > 1 else ""
    epochs = f" x {config.num_train_epochs:g} epochs = {counted(total, 'step')}" if config.num_train_epochs != 1 else ""
    word = "packs" if config.batching == "packed" else "rows"
    a_step = counted(accumulation, "sequence") + " per step"
    if batch != "auto":
        a_step = f"batch size {batch} x {counted(accumulation, 'accumulation step')}"
    formula = f"{units} {word} / ({a_step}{ranks}) = {counted(per_epoch, 'step')}{epochs}"
    if config.max_steps is not None:
        total = config.max_steps
        formula = f"max_steps={total} ({counted(per_epoch, 'step')} per epoch)"
    return Steps(per_epoch, total, formula)


def sequences_per_device(config: TrainConfig) -> int:
    """Return how many sequences a device contributes to an optimizer step."""
    batch, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    return accumulation if batch == "auto" else batch * accumulation


def first_micro_batch(config: TrainConfig, *, measured: bool) -> int:
    """Return the sequences of a micro-batch at the start; without `measured`, where memory use cannot be measured.

    There, `auto` is so many that UNMEASURED_TOKENS hold them at their longest, which most computers have room for.
    """
    if config.per_device_train_batch_size != "auto":
        return config.per_device_train_batch_size
    sequences = config.gradient_accumulation_steps
    return sequences if measured else largest_divisor(sequences, UNMEASURED_TOKENS // config.max_seq_length)


def largest_divisor(number: int, limit: int) -> int:
    """Return the largest divisor of a number that is not above a limit; at least 1."""
    return max(d for d in range(1, number + 1) if number % d == 0 and d <= max(limit, 1))


def config_hash(config: TrainConfig) -> str:
    """Return eight letters that tell two configurations apart: what belongs to a run's identity, and its length."""
    values = _settings(config, PATHS | PRESENTATION | MACHINES)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def with_output_dir(config: TrainConfig, now: datetime) -> TrainConfig:
    """Fill in the default `output_dir`."""
    if config.output_dir is not None:
        return config
    name = f"{now:%H-%M-%S}-{config.train_mode}-{config_hash(config)}"
    return replace(config, output_dir=str(Path(RUNS) / f"{now:%Y-%m-%d}" / name))


def identity(
    config: TrainConfig, world_size: int, data: Sequence[str], model: str, adapter: str | None
) -> dict[str, Any]:
    """Return what makes two runs the same: the config without paths, presentation and length, and the content.

    How many processes share a step's sequences does not matter, how many sequences make a step does.
    """
    values = _settings(config, PATHS | PRESENTATION | LENGTH | MACHINES)
    values[SEQUENCES] = sequences_per_device(config) * world_size
    return {"config": values, "data": list(data), "model": model, "adapter": adapter}


def _settings(config: TrainConfig, left_out: set[str]) -> dict[str, Any]:
    values = {k: v for k, v in asdict(config).items() if k not in left_out}
    values["data"] = {k: v for k, v in values["data"].items() if k != "num_workers"}
    return values


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Name what differs between two identities, as `key: was -> is`."""
    was, now = (flat(identity.get("config")) for identity in (one, other))
    changed = [key for key in sorted(was.keys() | now.keys()) if was.get(key) != now.get(key)]
    out = [f"{key}: {_changed(was.get(key), now.get(key))}" for key in changed]
    for key, word in (
        ("data", "the training data"),
        ("model", "the base model"),
        ("adapter", "the adapter to start from"),
    ):
        if one.get(key) != other.get(key):
            out.append(f"{word} is another")
    return out


def _changed(was: Any, now: Any) -> str:
    return " -> ".join(differing(*(json.dumps(value, ensure_ascii=False) for value in (was, now)), most=60))


def propose_length(lengths: Sequence[int], share: float = 0.99) -> int:
    """Return the smallest multiple of 64 tokens that covers a share of the rows."""
    ordered = sorted(lengths)
    needed = ordered[min(len(ordered) - 1, int(share * len(ordered)))]
    return -(-needed // 64) * 64
