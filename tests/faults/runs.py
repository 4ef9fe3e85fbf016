"""What the fault tests run, and what of a run must come out bitwise equal however often it was interrupted."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tests.conftest import SMALL, over

from sftx.config.checks.check import freeze
from sftx.config.composition.prepare import compose_checked
from sftx.config.schema import TrainConfig
from sftx.training.saving.metrics import read_metrics

FAULTY = over(
    SMALL, "mode=lora", "lora_dropout=0.2", "max_train_rows=16", "eval_max_rows=3", "max_seq_length=64", "max_steps=6",
    "gradient_accumulation_steps=2", "per_device_train_batch_size=2", "save_strategy=steps", "save_steps=2", "eval_steps=2",
    "save_total_limit=2", "eval_ratio=0.15",
)  # fmt: skip
"""Four steps an epoch, so that six end in the second; dropout, accumulation, evaluations and rotation in between."""


def words(folder: Path, *typed: str) -> list[str]:
    return over(FAULTY, f"output_dir={folder}", *typed)


def composed(folder: Path, *typed: str) -> TrainConfig:
    return freeze(compose_checked(words(folder, *typed)))


def outcome(folder: Path) -> dict[str, Any]:
    """Return what two runs must have alike: every record but the speeds, each byte of `final/`, and the result."""
    records = [
        {k: repr(v) for k, v in r.items() if not k.startswith("perf/") and k != "eval/seconds"}
        for r in read_metrics(folder / "metrics.jsonl")
    ]
    final = {str(p.relative_to(folder)): sha256(p) for p in sorted((folder / "final").rglob("*")) if p.is_file()}
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return {"records": records, "final": final, "status": manifest["status"], "result": manifest.get("result")}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def leftovers(folder: Path) -> list[Path]:
    """Return what a run must not leave behind once it has ended."""
    return [p for p in folder.rglob(".*") if p.name.endswith(".sftx-tmp") or p.name == ".lock"]
