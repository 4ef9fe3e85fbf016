"""Sixteen runs start at once on one cold cache, and the one that builds is killed: what is built is built once."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from tests.conftest import ROOT
from tests.faults.test_kill import SEED

COUNT = 16
KINDS = ("records", "tokens", "models")


def race(folder: Path, victims: str, seed: int) -> None:
    """Start the processes on a cold cache of their own, and look at what they found and left."""
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.race", str(folder), str(COUNT), victims, str(seed)], cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report, what = json.loads(done.stdout), f"killed in {victims}, seed {seed}"
    said = "\n".join(f.read_text()[-2000:] for f in folder.glob("*.said"))
    killed = [-9] if victims != "none" else []
    assert report["codes"] == [*killed, *[0] * (COUNT - len(killed))], f"{what}: {report['codes']}\n{said}"
    told = Counter(report["told"])
    found = {line: n for line, n in told.items() if line.startswith("found ")}
    assert len(found) == 1, f"{what}: not all found the same"
    assert sum(found.values()) == COUNT - len(killed)
    for kind in KINDS:
        assert told[f"built {kind}"] == 1, f"{what}: {told}"
        assert told[f"began {kind}"] == 1 + (kind == victims), f"{what}: {told}"
    left = list((folder / "cache").rglob(".*"))
    assert left == [], f"{what}: {left}"


@pytest.mark.parametrize("victims", ["tokens", "models"])
def test_sixteen_runs_on_a_cold_cache(tmp_path: Path, victims: str) -> None:
    race(tmp_path / "race", victims, SEED)


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_sixteen_runs_on_a_cold_cache_twenty_times(tmp_path: Path) -> None:
    rng, failures = random.Random(SEED), []
    for number in range(20):
        try:
            race(tmp_path / str(number), ("none", *KINDS)[number % 4], rng.randrange(10**6))
        except AssertionError as error:
            failures.append(str(error))
    assert not failures, f"{len(failures)} of 20:\n" + "\n\n".join(failures)
