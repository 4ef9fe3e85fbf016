"""The one comparison of runs: settings, environment, data, model, what was in force, metrics, weights, result."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from typing import Any

from sftx.config.derive import PATHS
from sftx.config.trees import flat
from sftx.data.store.digests import known_sha256
from sftx.runs.saved.saved_run import CONFIG, METRICS, Records, SavedRun, at
from sftx.training.saving.run_folder import MANIFEST

ABSENT = "(not there)"
"""Stands for a value that one of two runs does not have."""
DIGITS = 16
"""Of a SHA-256, those that are shown."""
LOSSES = ("train/loss", "train/grad_norm", "eval/loss")
"""Metrics that are named first."""


@dataclass(frozen=True)
class Difference:
    """A value of two runs; one that does not count is of time or folder."""

    key: str
    a: Any
    b: Any
    counts: bool = True


@dataclass(frozen=True)
class Change:
    """A metric that has two values at a step."""

    metric: str
    step: int
    a: Any
    b: Any

    @property
    def distance(self) -> float:
        """How far the values are apart; infinitely when one is no finite number."""
        finite = all(isinstance(v, int | float) and math.isfinite(v) for v in (self.a, self.b))
        return abs(self.a - self.b) if finite else math.inf


@dataclass(frozen=True)
class Metric:
    """One metric of two runs: at how many steps each recorded it, and how far apart they are where both did."""

    name: str
    steps_a: int
    steps_b: int
    shared: int
    first: Change | None
    """The first of the shared steps at which it differs."""
    largest: float
    """The largest difference."""
    largest_step: int | None

    @property
    def differs(self) -> bool:
        """True if any value differs, or one run has values that the other has not."""
        return self.first is not None or not self.steps_a == self.steps_b == self.shared


@dataclass
class Section:
    """One kind of what two runs are compared in; `unknown` says why they could not be."""

    name: str
    differences: Sequence[Difference] = ()
    metrics: Sequence[Metric] = ()
    unknown: list[str] = field(default_factory=list)

    @property
    def differs(self) -> bool:
        """True if something differs but time, folder and speed, or could not be compared."""
        return bool(self.unknown) or any(d.counts for d in self.differences) or any(m.differs for m in self.metrics)

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {k: v for k, v in asdict(self).items() if v or k == "differences"} | {"differs": self.differs}


def compare(a: SavedRun, b: SavedRun) -> list[Section]:
    """Compare two runs in everything that their folders hold."""

    def section(name: str, file: str, find: Callable[[], list[Difference]]) -> Section:
        unknown = list(dict.fromkeys(run.problems[file] for run in (a, b) if file in run.problems))
        return Section(name, unknown=unknown) if unknown else Section(name, find())

    metrics = Section("metrics", metrics=compare_records(a.records, b.records))
    metrics.unknown = [run.problems[METRICS] for run in (a, b) if METRICS in run.problems]
    return [
        section("config", CONFIG, lambda: config_differences(a, b)),
        section("environment", MANIFEST, lambda: environment_differences(a.manifest, b.manifest)),
        section("data", MANIFEST, lambda: data_differences(a.manifest, b.manifest)),
        section("model", MANIFEST, lambda: between(model_of(a), model_of(b))),
        section("effective", MANIFEST, lambda: between(effective_of(a), effective_of(b))),
        metrics,
        Section("weights", between(weights_of(a), weights_of(b))),
        section("result", MANIFEST, lambda: _result_differences(a, b)),
    ]


def between(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Difference]:
    """Return what differs between two flat mappings, in the order of the first."""
    return [
        Difference(key, a.get(key, ABSENT), b.get(key, ABSENT))
        for key in dict.fromkeys([*a, *b])
        if a.get(key, ABSENT) != b.get(key, ABSENT)
    ]


def config_differences(a: SavedRun, b: SavedRun) -> list[Difference]:
    """Compare the settings; paths come last, and only those that lead to different places."""
    found = between(flat(a.config), flat(b.config))

    def place(value: Any, run: SavedRun) -> str | None:
        known = isinstance(value, str) and value != ABSENT and run.directory is not None
        return os.path.normpath(run.directory / value) if known else None

    paths = [d for d in found if d.key in PATHS and ((x := place(d.a, a)) is None or x != place(d.b, b))]
    settings = [d for d in found if d.key not in PATHS]
    return settings + [Difference(d.key, d.a, d.b, counts=d.key != "output_dir") for d in paths]


def environment_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Difference]:
    """Compare two manifests in versions, code, hardware and number of processes; not in when the runs began."""
    sides = []
    for one in (a, b):
        found = one.get("environment")
        facts = {k: v for k, v in found.items() if k not in ("started", "git")} if isinstance(found, dict) else {}
        git = at(found, "git")
        sides.append(
            flat(facts) | {"git.commit": at(git, "commit"), "git.diff": diff_words(git), "ranks": one.get("ranks")}
        )
    return between(*sides)


def diff_words(git: Any) -> str:
    """Name the uncommitted changes of a checkout by their size and hash, as the manifest holds them."""
    diff = at(git, "diff")
    if isinstance(diff, str) and diff:
        digest = hashlib.sha256(diff.encode("utf-8", "replace")).hexdigest()[:12]
        return f"{len(diff.splitlines())} lines of changes, sha256 {digest}"
    return "none, but files that git does not know" if at(git, "dirty") else "none"


def data_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Difference]:
    """Compare the corpora of two manifests: how they were read, file by file by content, and the rows used."""
    out: list[Difference] = []
    corpora = [found if isinstance(found := one.get("data"), list) else [] for one in (a, b)]
    for number, (x, y) in enumerate(zip_longest(*corpora)):
        name = "training corpus" if number == 0 else "held-out corpus"
        if not isinstance(x, dict) or not isinstance(y, dict):
            out.append(Difference(name, at(x, "path") or ABSENT, at(y, "path") or ABSENT))
            continue
        facts = [
            k
            for k in ("rows", "format", "encoding", "delimiter", "shape", "schema", "skipped_rows")
            if k in x and k in y
        ]
        out += between({f"{name}: {k}": x[k] for k in facts}, {f"{name}: {k}": y[k] for k in facts})
        for (old_path, old), (path, new) in zip_longest(_contents(x), _contents(y), fillvalue=(None, ABSENT)):
            if old != new:
                out.append(Difference(f"{name}: {path or old_path}", old, new))
    rows = [one.get("rows") for one in (a, b)]
    return out + (between(*({f"rows.{k}": v for k, v in flat(found).items()} for found in rows)) if all(rows) else [])


def _contents(corpus: Mapping[str, Any]) -> list[tuple[str | None, str]]:
    """Return path and hash of each file of a corpus, as a manifest holds them; of a stream, of all names and sizes."""
    if streamed := corpus.get("names_and_sizes_sha256"):
        return [(corpus.get("path"), f"names and sizes {streamed[:DIGITS]}")]
    files = corpus.get("files")
    known = [f for f in files if isinstance(f, dict)] if isinstance(files, list) else [corpus]
    return [(f.get("path"), f.get("missing") or f"sha256 {str(f.get('sha256'))[:DIGITS]}") for f in known]


def model_of(run: SavedRun) -> dict[str, Any]:
    """Return what says which model was trained, wherever it lay."""
    facts = {k: v for k, v in flat(run.fact("model")).items() if k not in ("folder", "name")}
    return facts | {"fingerprint": run.fact("identity", "model"), "adapter": run.fact("identity", "adapter")}


def effective_of(run: SavedRun) -> dict[str, Any]:
    """Return the settings that were in force, and each fallback."""
    fallbacks = run.fact("effective", "fallbacks")
    return flat(run.fact("effective", "settings")) | {
        f"fallback of {at(f, 'key')}": f"{at(f, 'requested')} -> {at(f, 'effective')}: {at(f, 'reason')}"
        for f in (fallbacks if isinstance(fallbacks, list) else ())
    }


def weights_of(run: SavedRun) -> dict[str, Any]:
    """Return the SHA-256 of each file of weights in `final/`."""
    return {name: known_sha256(path) for name, path in run.weights().items()}


def _result_differences(a: SavedRun, b: SavedRun) -> list[Difference]:
    """Compare how two runs ended; in how many attempts does not count: a resumed run is the run itself."""
    sides = []
    for run in (a, b):
        error = {"error": run.fact("error")} if run.status in ("failed", "stopped") else {}
        sides.append({"status": run.status} | error | flat(run.fact("result")))
    attempts = [Difference("attempts", a.attempts, b.attempts, counts=False)] if a.attempts != b.attempts else []
    return between(*sides) + attempts


def is_speed(metric: str) -> bool:
    """Return True for what is measured in time, and never the same twice."""
    return metric.startswith("perf/") or metric.endswith("/seconds")


def compare_records(a: Records, b: Records) -> list[Metric]:
    """Compare metric by metric, to the last bit; the losses come first, speed is left out."""
    names = dict.fromkeys(
        [*LOSSES, *(name for records in (a, b) for step in sorted(records) for name in records[step])]
    )
    found = (_metric(name, a, b) for name in names if not is_speed(name))
    return [metric for metric in found if metric.steps_a or metric.steps_b]


def _metric(name: str, a: Records, b: Records) -> Metric:
    one, other = ({step: r[name] for step, r in records.items() if name in r} for records in (a, b))
    shared = sorted(one.keys() & other.keys())
    changes = [Change(name, step, one[step], other[step]) for step in shared if not same(one[step], other[step])]
    largest = max(changes, key=lambda change: change.distance, default=None)
    return Metric(
        name, len(one), len(other), len(shared), changes[0] if changes else None,
        largest.distance if largest else 0.0, largest.step if largest else None,
    )  # fmt: skip


def same(a: Any, b: Any) -> bool:
    """Return True for the same bits: NaN is NaN, and 0.0 is not -0.0."""
    return repr(a) == repr(b)


def first_change(metrics: Sequence[Metric]) -> Change | None:
    """Return where two runs differ first, of the steps that both have; of a step, the loss before what follows it."""
    return min((m.first for m in metrics if m.first), key=lambda change: change.step, default=None)


@dataclass(frozen=True)
class Verdict:
    """Whether a run had the same bits again."""

    same: bool
    first: Change | None
    metrics: list[Metric]
    weights: list[Difference]
    compared_weights: bool
    shared_steps: int


def judge(old: SavedRun, new: SavedRun) -> Verdict:
    """Compare every recorded metric but speed, and the weights in `final/`; of an unfinished run, what both have.

    A run that was resumed with a larger max_steps was also evaluated where it ended first.
    """
    metrics = compare_records(old.records, new.records)
    first = first_change(metrics)
    before, after = weights_of(old), weights_of(new)
    weights = between(before, after) if before else []
    shared = len(old.records.keys() & new.records.keys())
    if old.status != "completed":
        complete = True
    elif old.attempts > 1:
        complete = all(m.steps_b == m.shared for m in metrics)
    else:
        complete = not any(m.differs for m in metrics)
    same_bits = first is None and complete and not weights and bool(shared or before)
    return Verdict(same_bits, first, metrics, weights, bool(before), shared)
