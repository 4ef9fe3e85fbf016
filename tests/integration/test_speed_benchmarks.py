"""The benchmarks run, at a size of seconds, and print what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def printed(*words: str) -> list[dict[str, Any]]:
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_gpu_at_toy_size() -> None:
    *runs, last = printed(
        "benchmarks/gpu/bench.py", "--shapes", "toy", "--length", "64", "--steps", "6", "--modes", "lora"
    )
    by_trainer = {run["trainer"]: run for run in runs}
    assert by_trainer.keys() == {"sftx", "defaults", "plain", "trl"}
    for trainer in ("sftx", "defaults", "plain"):
        run = by_trainer[trainer]
        assert run["tokens_per_second"] > 0
        assert 0 < run["mfu"] < 2
        assert run["peak_memory_gb"] > 0
    assert by_trainer["sftx"]["first_loss"] == pytest.approx(by_trainer["plain"]["first_loss"], rel=0.02)
    trl = by_trainer["trl"]
    assert "tokens_per_second" in trl or "trl" in trl["failed"]
    assert last["ratios"]["toy lora / plain"] > 0


def test_parts_of_a_gpu_step_at_toy_size() -> None:
    """Each way was timed, but for what needs a GPU or another package."""
    lines = printed("benchmarks/gpu/parts.py", "--shapes", "toy", "--tokens", "64", "--length", "32")
    ways = {f"{line['part']}: {way}": found for line in lines for way, found in line.items()}
    for way in ("norm: torch, outside autocast", "linear: sftx", "four_bits: sftx", "four_bits: unfolding alone"):
        assert isinstance(ways[way], float), ways[way]


def test_limit() -> None:
    (line,) = printed("benchmarks/limit.py", "--model", "tiny", "--rows", "32")
    assert 0.02 < line["share"] < 1.2
    assert line["share"] == pytest.approx(line["tokens_per_second"] / line["limit_tokens_per_second"], abs=2e-3)
    assert line["tokens"] > 1000
