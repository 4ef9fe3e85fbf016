"""kill -9 at any moment: the same command goes on from the last published checkpoint, to the very same end.

The long form is `pytest -m faults -k kill -s`; its last line counts the kills by what the run was doing.
SFTX_FAULTS_SEED repeats one with the moments of another.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import ROOT
from tests.faults.kill import FINAL, RUN, SAVE, Zygote
from tests.faults.runs import leftovers, outcome, words

from sftx.files import sweep
from sftx.training.saving import checkpoint

KINDS = {
    "lora": [],
    "packed": ["batching=packed", "save_steps=1", "optimizer=adamw_8bit"],
    "full": ["mode=full", "max_steps=4"],
    "workers": ["dataloader_num_workers=2", "batching=padded", "keep_best=true", "scheduler=reduce_lr_on_plateau"],
    "qlora": ["mode=qlora", "save_steps=3", "eval_steps=1"],
    "streamed": ["data.streaming=true", "eval_ratio=0"],
}
SEED = int(os.environ.get("SFTX_FAULTS_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)


@dataclass
class Straight:
    """A run that nothing interrupted, and what it wrote in which order."""

    typed: list[str]
    end: dict[str, Any]
    seconds: float
    calls: list[list[str]]

    def writes(self, where: str) -> int:
        """Return how many writes there were to a place."""
        return sum(place == where for place, _, _ in self.calls)

    def saves(self) -> list[range]:
        """Return the writes of each save, by their numbers among those to checkpoints/."""
        starts, number = [], 0
        for place, call, path in self.calls:
            number += place == SAVE
            if (place, call, path) == (SAVE, "mkdir", "checkpoints"):
                starts.append(number)
        return [range(a, b) for a, b in zip(starts, [*starts[1:], self.writes(SAVE) + 1], strict=True)]


Make = Callable[[str], Straight]


@pytest.fixture(scope="module")
def straight(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Return a function that makes a kind of run, once."""
    made: dict[str, Straight] = {}

    def make(kind: str) -> Straight:
        if kind not in made:
            folder = tmp_path_factory.mktemp("straight") / kind
            report = zygote.run(folder, words(folder, *KINDS[kind]), calls=True)
            assert report["code"] == 0, said(folder)
            made[kind] = Straight(KINDS[kind], outcome(folder), report["seconds"], report["calls"])
            shutil.rmtree(folder)
        return made[kind]

    return make


@pytest.fixture(scope="module")
def tally() -> Iterator[Counter[str]]:
    counted: Counter[str] = Counter()
    yield counted
    print("\n" + json.dumps({"seed": SEED, "kills": sum(counted.values()), "by phase": dict(counted.most_common())}))


def said(folder: Path) -> str:
    return (folder.parent / f"{folder.name}.said").read_text(encoding="utf-8")[-3000:]


def published(folder: Path) -> int:
    """Return the step of the newest checkpoint, once each is seen to be whole."""
    for found in checkpoint.listed(folder / "checkpoints"):
        assert checkpoint.problem_of(found) is None, found
    newest, _ = checkpoint.newest_verified(folder / "checkpoints")
    return checkpoint.step_of(newest) if newest else 0


def manifest_of(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def finish(zygote: Zygote, folder: Path, straight: Straight, *, orphans: bool = True) -> None:
    """Let a run come to its end, and compare that with the straight run's."""
    before, manifest = published(folder), manifest_of(folder)
    report = zygote.run(folder, words(folder, *straight.typed), orphans=orphans)
    assert report["code"] == 0, said(folder)
    if manifest.get("status") == "completed":
        assert manifest_of(folder) == manifest, "a finished run is left as it is"
    else:
        attempts = manifest_of(folder)["attempts"]
        assert attempts[-1]["from_step"] == before, "continues from the last published checkpoint"
    assert outcome(folder) == straight.end
    assert leftovers(folder) == []


def killed(
    zygote: Zygote, folder: Path, straight: Straight, moments: Sequence[dict[str, Any]], tally: Counter[str]
) -> None:
    """Kill a run, and those that go on with it, at each of some moments; then let it end."""
    for moment in moments:
        report = zygote.run(folder, words(folder, *straight.typed), **moment)
        if report["code"] == 0:
            break  # it came to its end before
        assert report["code"] == -signal.SIGKILL, said(folder)
        assert report["orphans"] >= 0, "a process that the run had started lives on"
        tally[report["phase"]] += 1
        published(folder)
    finish(zygote, folder, straight)
    shutil.rmtree(folder)


def at_write(where: str, number: int, do: str = "kill") -> dict[str, Any]:
    return {"watch": {"do": do, "at": number, "where": where}}


def moment_of(rng: random.Random, straight: Straight) -> dict[str, Any]:
    """Return a random moment: of the time, or before or amidst a write."""
    where = rng.choices((None, SAVE, FINAL, RUN), (10, 7, 1, 2))[0]
    if where is None:
        return {"seconds": rng.uniform(0, straight.seconds)}
    return at_write(where, rng.randint(1, straight.writes(where)), rng.choice(("kill", "tear")))


def random_kills(
    zygote: Zygote,
    straight: Make,
    base: Path,
    rng: random.Random,
    tally: Counter[str],
    count: int,
    kinds: Sequence[str],
) -> None:
    """Kill runs until so many kills have hit; every failure is told, with what repeats it."""
    failures, number = [], 0
    while sum(tally.values()) < count:
        number += 1
        kind = kinds[number % len(kinds)]
        moments = [moment_of(rng, straight(kind)) for _ in range(rng.choices((1, 2, 3), (7, 2, 1))[0])]
        try:
            killed(zygote, base / str(number), straight(kind), moments, tally)
        except AssertionError as error:
            failures.append(f"{kind} {moments}: {error}")
    assert not failures, f"seed {SEED}: {len(failures)} of {number} runs failed:\n" + "\n\n".join(failures)


@pytest.mark.slow
def test_a_few_kills_at_random_moments(zygote: Zygote, straight: Make, tmp_path: Path) -> None:
    random_kills(zygote, straight, tmp_path, random.Random(SEED), Counter(), 6, ["lora"])


def test_before_its_first_checkpoint_a_killed_run_starts_over(zygote: Zygote, straight: Make, tmp_path: Path) -> None:
    """Once while the folder is being made, once when there are records already: none is there twice."""
    one = straight("lora")
    making = [path for place, _, path in one.calls if place == RUN]
    at = next(n for n, path in enumerate(making, 1) if path.startswith(".config.yaml"))
    killed(zygote, tmp_path / "run", one, [at_write(RUN, 5), at_write(RUN, at), at_write(SAVE, 1)], Counter())


def test_each_stage_of_a_save_leaves_whole_checkpoints(zygote: Zygote, straight: Make, tmp_path: Path) -> None:
    """What a kill before each write of the last save would leave; of those that look alike one is gone on with."""
    one, base = straight("lora"), tmp_path / "stages"
    watch = {"do": "snapshot", "at": one.saves()[-1].start, "into": str(base)}
    report = zygote.run(tmp_path / "run", words(tmp_path / "run"), watch=watch)
    assert report["code"] == 0, said(tmp_path / "run")
    tried, stages = set(), sorted(base.iterdir())
    assert len(stages) == len(one.saves()[-1])
    for stage in stages:
        names = tuple(f.name for f in checkpoint.listed(stage / "checkpoints"))
        assert published(stage) == (6 if "step-000006" in names else 4)
        assert names[-2:] in (("step-000002", "step-000004"), ("step-000004", "step-000006")), (
            "none is removed too early"
        )
        if names not in tried:
            tried.add(names)
            finish(zygote, stage, one)
        else:
            sweep(stage / "checkpoints")
            assert {f.name for f in (stage / "checkpoints").iterdir()} == set(names)
    assert len(tried) == 3
    shutil.rmtree(base)


def test_what_is_published_is_on_the_disk_first(straight: Make) -> None:
    """Every file, then the folder that names them, then the rename, then the folder above."""
    calls = [(call, path) for place, call, path in straight("lora").calls if place == SAVE]
    first = calls[straight("lora").saves()[0].start - 1 : straight("lora").saves()[1].start - 1]
    written = {path for call, path in first if call in ("open", "serialize")}
    assert len(written) == 6
    (publishing,) = [i for i, (call, _) in enumerate(first) if call == "rename"]
    synced = [path for call, path in first[:publishing] if call == "fsync"]
    folder = first[publishing][1].split(" -> ")[0]
    assert written | {folder} <= set(synced)
    assert synced[-1] == folder
    assert ("fsync", "checkpoints") in first[publishing:]


def test_a_killed_run_with_loader_processes_can_be_gone_on_with_at_once(
    zygote: Zygote, straight: Make, tmp_path: Path
) -> None:
    """They may outlive it by a moment: the lock is not theirs, and none stays."""
    one, folder = straight("workers"), tmp_path / "run"
    at = one.saves()[1].start
    report = zygote.run(folder, words(folder, *one.typed), **at_write(SAVE, at), orphans=False)
    assert report["code"] == -signal.SIGKILL, said(folder)
    finish(zygote, folder, one, orphans=False)
    until = time.monotonic() + 20
    while (left := processes_with(str(folder))) and time.monotonic() < until:
        time.sleep(0.1)
    assert not left


def processes_with(text: str) -> list[int]:
    """Return the processes that have a file open whose path holds a text."""
    found = []
    for descriptors in Path("/proc").glob("[0-9]*/fd"):
        try:
            if any(text in str(f.readlink()) for f in descriptors.iterdir()):
                found.append(int(descriptors.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.faults
@pytest.mark.timeout(2400)
def test_kill_at_200_random_moments(zygote: Zygote, straight: Make, tmp_path: Path, tally: Counter[str]) -> None:
    ours = Counter[str]()
    random_kills(zygote, straight, tmp_path, random.Random(SEED), ours, 200, list(KINDS))
    tally.update(ours)
    assert ours["saving"] + ours["rotating"] >= 50, ours


@pytest.mark.faults
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_kill_at_every_stage(zygote: Zygote, straight: Make, tmp_path: Path, kind: str, tally: Counter[str]) -> None:
    """Before each write of the last save with its rotation, some others, and those to final/; and amidst each."""
    one = straight(kind)
    saves = one.saves()
    moments = [(SAVE, n) for n in ((*saves[0][::4], *saves[-1]) if kind == "lora" else saves[-1])]
    if kind == "lora":
        moments += [(FINAL, n) for n in range(1, one.writes(FINAL) + 1)]
        moments += [(RUN, n) for n in range(1, one.writes(RUN) + 1, 2)]
    failures = []
    for where, number in moments:
        calls = [call for place, call, _ in one.calls if place == where]
        torn = number > 1 and calls[number - 2] in ("open", "serialize")
        for do in ("kill", "tear") if torn else ("kill",):
            try:
                killed(zygote, tmp_path / f"{where}-{number}-{do}", one, [at_write(where, number, do)], tally)
            except AssertionError as error:
                failures.append(f"{do} at {where} {number} ({calls[number - 1]}): {error}")
    assert not failures, "\n\n".join(failures)


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_kill_through_the_command_line(straight: Make, tmp_path: Path, tally: Counter[str]) -> None:
    """Twenty runs of train.py, each killed once with all its processes, and repeated with the same command."""
    one, rng, failures = straight("lora"), random.Random(SEED), []
    started = time.monotonic()
    assert typed(tmp_path / "first", None) == 0
    lasts = time.monotonic() - started
    for number in range(20):
        folder = tmp_path / str(number)
        after = rng.uniform(0 if number % 2 else 0.7 * lasts, lasts)  # starting takes most of the time
        code = typed(folder, after)
        if code != 0:
            tally["command line, " + ("a checkpoint was there" if published(folder) else "no checkpoint yet")] += 1
        before = published(folder)
        again = typed(folder, None)
        if again != 0 or outcome(folder) != one.end or leftovers(folder):
            failures.append(f"killed after {after:.2f} s at step {before}: exit code {again}\n{said(folder)}")
    assert not failures, "\n\n".join(failures)


def typed(folder: Path, seconds: float | None) -> int:
    """Run train.py in a session of its own; kill it after some seconds, and return its exit code."""
    with (folder.parent / f"{folder.name}.said").open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "train.py", *words(folder)], cwd=ROOT, stdout=out, stderr=out, start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()
