"""Every signal in every phase, with and without loader processes, one rank and two: saved, said, and gone on from.

The long form is `pytest -m faults tests/faults/test_signal_matrix.py -s`; its last line counts the cases.
SFTX_FAULTS_SEED repeats one with the moments of another.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.faults.kill import Zygote
from tests.faults.moment import PLACES, told
from tests.faults.runs import leftovers, outcome, words
from tests.faults.test_kill import SEED, published, said

from sftx.errors import EXIT_STOPPED
from sftx.processes import STOP_SIGNALS

SLACK = 2.0
"""Seconds that a run has beside a step and a save."""
STEPS = 6
MANY = 2400
"""Records, so that others than the trainer tokenise."""
EVERY = 3
"""Every third case of one rank is gone on with to its end, and four of those of two ranks."""
TWO = ["parallel=ddp", "parallel.num_processes=2", "gradient_accumulation_steps=1"]
CORPUS = "many.csv"


@dataclass(frozen=True)
class Case:
    """What is sent to which run, and when."""

    signal: str
    phase: str
    kind: str
    """Which settings the run has: a key of what `typed` knows."""
    visit: int
    to: str = "self"
    """`self`, `group`, `command`, or `rank 1`."""
    goes_on: bool = True
    asynchronous: bool = True

    def __str__(self) -> str:
        return f"{self.signal}-{self.phase}-{self.visit}-{self.kind}-{self.to.replace(' ', '')}"

    @property
    def ranks(self) -> int:
        return 2 if self.kind == "2 ranks" else 1

    @property
    def before_the_first_step(self) -> bool:
        return self.phase in ("loading", "tokenising") or (self.phase, self.visit) == ("evaluating", 1)


def visit_of(phase: str, turn: int) -> int:
    """Return which visit of a phase a turn is about: each but the last ones, after which all is done."""
    counts = {"loading": 4, "tokenising": 2, "stepping": 5, "evaluating": 3, "saving": 2}
    return turn % counts[phase] + 1


def cases() -> list[Case]:
    """Return the matrix."""
    names, found = [n.name for n in STOP_SIGNALS], []
    for number, (at, phase, workers) in enumerate(itertools.product(range(4), PLACES, (0, 2))):
        kind = "tokenisers" if workers and phase == "tokenising" else f"{workers} workers"
        to = "group" if workers and at % 2 else "self"
        turn = at + workers + (at // 2 if phase in ("saving", "tokenising") else 0)
        found.append(Case(names[at], phase, kind, visit_of(phase, turn), to, number % EVERY == 0, at % 2 == 0))
    targets = itertools.cycle(("command", "self", "command", "rank 1"))
    for number, (at, turn) in enumerate(itertools.product(range(4), range(3))):
        phase = list(PLACES)[(3 * at + turn) % 5]
        to = next(targets)
        found.append(Case(names[at], phase, "2 ranks", visit_of(phase, at + 1), to, number in (0, 5, 7, 10)))
    return found


CASES = cases()


@dataclass
class Straight:
    """A run that nothing asked to end, and how long its phases took."""

    typed: list[str]
    end: dict[str, Any]
    seconds: dict[tuple[str, int], float]

    def longest(self, phase: str) -> float:
        return max(s for (name, _), s in self.seconds.items() if name == phase)

    def allowed(self) -> float:
        return self.longest("stepping") + self.longest("saving") + SLACK


@dataclass
class Tally:
    """What the last line says."""

    tried: int = 0
    passed: list[Case] = field(default_factory=list)
    hit: Counter[str] = field(default_factory=Counter)
    share: float = 0.0
    slowest: str = ""

    def line(self) -> str:
        def count(key: Callable[[Case], str]) -> dict[str, int]:
            return dict(Counter(map(key, self.passed)))

        return json.dumps({
            "seed": SEED, "passed": f"{len(self.passed)}/{self.tried}", "by phase": count(lambda c: c.phase),
            "by signal": count(lambda c: c.signal), "by kind": count(lambda c: c.kind), "sent to": count(lambda c: c.to),
            **self.hit, "most of the allowed time": round(self.share, 2), "by": self.slowest,
        })  # fmt: skip


@pytest.fixture(scope="module")
def tally() -> Iterator[Tally]:
    counted = Tally()
    yield counted
    print("\n" + counted.line())


Make = Callable[[str], Straight]


@pytest.fixture(scope="module")
def straight(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Return a function that makes a kind of run, once."""
    made: dict[str, Straight] = {}
    base = tmp_path_factory.mktemp("straight")
    typed = {
        "0 workers": [],
        "2 workers": ["dataloader_num_workers=2"],
        "tokenisers": [
            f"train_file_path={base}", f"train_file_name={CORPUS}", "max_train_rows=null", "data.num_workers=2",
            "dataloader_num_workers=2",
        ],
        "2 ranks": TWO,
    }  # fmt: skip
    with (base / CORPUS).open("w", encoding="utf-8", newline="") as file:
        write = csv.writer(file).writerow
        write(["category", "human", "assistant"])
        for number in range(MANY):
            write(
                [("sums", "words")[number % 2], f"What is {number} and {number % 7}?", f"It is {number + number % 7}."]
            )

    def make(kind: str) -> Straight:
        if kind not in made:
            forget_tokens()
            folder = base / kind.replace(" ", "-")
            log = folder.parent / f"{folder.name}.log"
            report = zygote.run(folder, words(folder, *typed[kind]), **ways(kind, {"log": str(log)}))
            assert report["code"] == 0, said(folder)
            seconds = {(v["phase"], v["visit"]): v["seconds"] for v in told(log) if "phase" in v and not v["rank"]}
            made[kind] = Straight(typed[kind], outcome(folder), seconds)
            assert [r["step"] for r in made[kind].end["records"] if "train/loss" in r] == [
                str(s) for s in range(1, STEPS + 1)
            ]
            shutil.rmtree(folder)
        return made[kind]

    return make


def ways(kind: str, moment: dict[str, Any]) -> dict[str, Any]:
    """Return where a run is to be watched: in its own process, or in its ranks."""
    return {"ranks" if kind == "2 ranks" else "moment": moment}


def forget_tokens() -> None:
    """Let the next run tokenise."""
    shutil.rmtree(Path(os.environ["SFTX_CACHE"], "tokens"), ignore_errors=True)


def half_written() -> list[Path]:
    return [p for p in Path(os.environ["SFTX_CACHE"]).rglob(".*") if not p.name.endswith(".lock")]


def stepped(folder: Path) -> list[int]:
    """Return the steps that have left a record."""
    path = folder / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [r["step"] for r in records if "train/loss" in r]


def moment_of(case: Case, one: Straight, log: Path, rng: random.Random) -> dict[str, Any]:
    """Return what is to be sent; half of the time a second signal, the same or another, follows."""
    after = rng.random() * one.seconds.get((case.phase, case.visit), 0.0)
    number = signal.Signals[case.signal]
    moment = {"log": str(log), "phase": case.phase, "visit": case.visit, "after": after, "number": number}
    moment["to"] = "self" if case.to == "rank 1" else case.to
    if case.ranks > 1:
        moment["in_rank"] = int(case.to == "rank 1")
    if CASES.index(case) // 2 % 2 == CASES.index(case) % 2:
        moment |= {
            "second": rng.choice((number, *STOP_SIGNALS)),
            "later": rng.uniform(0.0, 0.001 if case.before_the_first_step else 0.05),
        }
    return moment


@pytest.mark.faults
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_signal_in_a_phase(zygote: Zygote, straight: Make, tmp_path: Path, case: Case, tally: Tally) -> None:
    tally.tried += 1
    one, folder, log = straight(case.kind), tmp_path / "run", tmp_path / "log"
    if case.phase == "tokenising":
        forget_tokens()
    typed = [*one.typed, f"async_save={str(case.asynchronous).lower()}"]
    moment = moment_of(case, one, log, random.Random(f"{SEED} {case}"))
    report = zygote.run(folder, words(folder, *typed), **ways(case.kind, moment))
    text, lines = said(folder), told(log)
    (sent,) = [line for line in lines if "sent" in line]
    assert case.phase in sent["here"] or sent["at_end"]
    assert report["code"] == EXIT_STOPPED, text
    first = {line.get("sent") or line.get("second") for line in lines}  # at once: the lower number is heard first
    assert case.to == "rank 1" or any(f"{name}: stopped " in text for name in first), text
    assert ": stopped " in text
    assert "Traceback" not in text
    assert zygote.left() == [], "an orphan"
    assert half_written() == []
    saved = assert_saved(case, folder, sent)
    codes = {line["rank"]: line["code"] for line in lines if "code" in line}
    if case.ranks > 1:
        assert set(codes.values()) == {EXIT_STOPPED}, f"{codes}: {text}"
        made = {line["made"] for line in lines if "code" in line}
        assert len(made) == 1, f"the ranks stopped at different steps: {made}"
    took = (report["ended"] - sent["time"]) / one.allowed()
    assert took <= 1, f"{report['ended'] - sent['time']:.2f} s"
    if took > tally.share:
        tally.share, tally.slowest = took, str(case)
    if case.goes_on:
        again = zygote.run(folder, words(folder, *typed), **({"ranks": {"log": str(log)}} if case.ranks > 1 else {}))
        assert again["code"] == 0, said(folder)
        assert outcome(folder) == one.end
        assert leftovers(folder) == []
        assert zygote.left() == []
    tally.hit["second signals"] += any("second" in line for line in told(log))
    tally.hit["gone on with"] += case.goes_on
    tally.hit["before the first step"] += not saved
    tally.passed.append(case)


def assert_saved(case: Case, folder: Path, sent: dict[str, Any]) -> int:
    """The last step that was made is the newest checkpoint, and whole; before the first there is none."""
    made = stepped(folder)
    assert made == list(range(1, len(made) + 1))
    late = (case.phase, case.visit) == ("evaluating", 1) and made == [1]  # the evaluation was over when it was heard
    discarded = (case.phase, case.visit) == ("stepping", 1) and made == []
    if (case.before_the_first_step and not late) or discarded:
        assert made == []
        assert not (folder / "checkpoints").exists()
        assert folder.exists() == (case.phase in ("evaluating", "stepping"))
    else:
        assert published(folder) == made[-1]
        assert made[-1] - sent["made"] <= 1, "at most the step that it is in, if all of its micro-batches were made"
    if folder.exists():
        assert json.loads((folder / "manifest.json").read_text())["status"] == "stopped"
        assert not (folder / "final").exists()
        assert leftovers(folder) == []
    return len(made)
