"""How two runs differ: settings, environment, data, model, what was in force, metrics, weights, result."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from sftx.config.derive import PATHS, flat
from sftx.data.digests import known_sha256
from sftx.runs.compare_metrics import Metric, compare_records
from sftx.runs.folder import MANIFEST
from sftx.runs.past import CONFIG, PastRun, at

ABSENT = "(not there)"
"""Stands for a value that one of two runs does not have."""
CORPUS = (
    "sha256", "names_and_sizes_sha256", "rows", "format", "encoding", "delimiter", "shape", "skipped_rows", "streamed",
)  # fmt: skip
"""Facts of a corpus that two runs are compared in; where its files lie is a setting."""


@dataclass(frozen=True)
class Difference:
    """A value of two runs; one that does not count is of time or folder, and no difference of the runs."""

    key: str
    a: Any
    b: Any
    counts: bool = True


@dataclass
class Section:
    """One kind of what two runs are compared in; `unknown` says why they could not be."""

    name: str
    differences: list[Difference] = field(default_factory=list)
    metrics: list[Metric] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    @property
    def differs(self) -> bool:
        """True when something differs but time, folder and speed, or could not be compared."""
        return bool(self.unknown) or any(d.counts for d in self.differences) or any(m.differs for m in self.metrics)

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {k: v for k, v in asdict(self).items() if v or k == "differences"} | {"differs": self.differs}


def compare(a: PastRun, b: PastRun) -> list[Section]:
    """Compare two runs in everything that their folders hold."""
    made: list[tuple[str, str, Callable[[PastRun, PastRun], list[Difference]]]] = [
        ("config", CONFIG, config_differences),
        ("environment", MANIFEST, lambda a, b: environment_differences(environment_of(a), environment_of(b))),
        (
            "data",
            MANIFEST,
            lambda a, b: data_differences(a.fact("data"), b.fact("data"), a.fact("rows"), b.fact("rows")),
        ),
        ("model", MANIFEST, lambda a, b: between(model_of(a), model_of(b))),
        ("effective", MANIFEST, lambda a, b: between(effective_of(a), effective_of(b))),
        ("weights", "", lambda a, b: between(weights_of(a), weights_of(b))),
        ("result", MANIFEST, lambda a, b: [*between(result_of(a), result_of(b)), *_apart(a, b)]),
    ]
    sections = [_section(name, file, find, a, b) for name, file, find in made]
    metrics = Section("metrics", metrics=compare_records(a.records, b.records))
    metrics.unknown = [r.problems["metrics.jsonl"] for r in (a, b) if "metrics.jsonl" in r.problems]
    return [*sections[:5], metrics, *sections[5:]]


def _section(
    name: str, file: str, find: Callable[[PastRun, PastRun], list[Difference]], a: PastRun, b: PastRun
) -> Section:
    unknown = list(dict.fromkeys(run.problems[file] for run in (a, b) if file in run.problems))
    return Section(name, unknown=unknown) if unknown else Section(name, find(a, b))


def between(a: dict[str, Any], b: dict[str, Any]) -> list[Difference]:
    """Return what differs between two flat mappings, in the order of the first."""
    return [
        Difference(key, a.get(key, ABSENT), b.get(key, ABSENT))
        for key in dict.fromkeys([*a, *b])
        if a.get(key, ABSENT) != b.get(key, ABSENT)
    ]


def config_differences(a: PastRun, b: PastRun) -> list[Difference]:
    """Compare the settings; paths come last, and only as far as they lead elsewhere."""
    found = between(flat(a.config), flat(b.config))
    settings = [d for d in found if d.key not in PATHS]
    paths = [d for d in found if d.key in PATHS and not _same_place(d, a, b)]
    return settings + [Difference(d.key, d.a, d.b, counts=d.key != "output_dir") for d in paths]


def _same_place(difference: Difference, a: PastRun, b: PastRun) -> bool:
    """Tell whether two paths lead to one place from where each run was started."""
    places = []
    for value, run in ((difference.a, a), (difference.b, b)):
        if not isinstance(value, str) or value == ABSENT or run.directory is None:
            return False
        places.append(os.path.normpath(run.directory / value))
    return places[0] == places[1]


def environment_of(run: PastRun) -> dict[str, Any]:
    """Return a run's stored environment, and how many processes it had."""
    found = run.fact("environment")
    return (found if isinstance(found, dict) else {}) | {"ranks": run.ranks}


def environment_differences(a: dict[str, Any], b: dict[str, Any]) -> list[Difference]:
    """Compare two environments as the manifest holds them: versions, code, hardware; not when they began."""
    sides = []
    for one in (a, b):
        told = {k: v for k, v in one.items() if k not in ("started", "git")}
        sides.append(flat(told) | {"git.commit": at(one, "git", "commit"), "git.diff": diff_words(one.get("git"))})
    return between(*sides)


def diff_words(git: Any) -> str:
    """Name the uncommitted changes of a checkout by their size and hash, as the manifest holds them."""
    diff = at(git, "diff")
    if isinstance(diff, str) and diff:
        digest = hashlib.sha256(diff.encode("utf-8", "replace")).hexdigest()[:12]
        return f"{len(diff.splitlines())} lines of changes, sha256 {digest}"
    return "none, but files that git does not know" if at(git, "dirty") else "none"


def data_differences(a: Any, b: Any, rows_a: Any = None, rows_b: Any = None) -> list[Difference]:
    """Compare the corpora of two runs: by content, file by file, and by the rows that were used."""
    out: list[Difference] = []
    one, other = _corpora(a), _corpora(b)
    for number, (x, y) in enumerate(zip_longest(one, other)):
        name = "training corpus" if number == 0 else "held-out corpus"
        if x is None or y is None:
            out.append(Difference(name, _path(x), _path(y)))
            continue
        facts = [{f"{name}: {key}": c[key] for key in CORPUS if key in c} for c in (x, y)]
        out += between(*facts)
        if len(x.get("files", ())) > 1 or len(y.get("files", ())) > 1:
            out += between(_files(x), _files(y))
    counts = [{f"rows.{k}": v for k, v in flat(rows).items()} for rows in (rows_a, rows_b)]
    return out + between(*counts)


def _corpora(found: Any) -> list[dict[str, Any]]:
    return [c for c in found if isinstance(c, dict)] if isinstance(found, list) else []


def _path(corpus: dict[str, Any] | None) -> str:
    return ABSENT if corpus is None else str(corpus.get("path"))


def _files(corpus: dict[str, Any]) -> dict[str, Any]:
    files = corpus.get("files")
    known = [f for f in files if isinstance(f, dict)] if isinstance(files, list) else []
    return {Path(str(f.get("path"))).name: f.get("sha256") or f.get("bytes") for f in known}


def model_of(run: PastRun) -> dict[str, Any]:
    """Return what says which model was trained, wherever it lay."""
    told = flat(run.fact("model"))
    for place in ("folder", "name"):
        told.pop(place, None)
    return told | {"fingerprint": run.fact("identity", "model"), "adapter": run.fact("identity", "adapter")}


def effective_of(run: PastRun) -> dict[str, Any]:
    """Return the settings that were in force, and each fallback."""
    out = flat(run.fact("effective", "settings"))
    fallbacks = run.fact("effective", "fallbacks")
    for f in fallbacks if isinstance(fallbacks, list) else ():
        out[f"fallback of {at(f, 'key')}"] = f"{at(f, 'asked')} -> {at(f, 'effective')}: {at(f, 'reason')}"
    return out


def weights_of(run: PastRun) -> dict[str, Any]:
    """Return the SHA-256 of each file of weights in `final/`."""
    return {f"final/{name}": known_sha256(path) for name, path in run.weights().items()}


def result_of(run: PastRun) -> dict[str, Any]:
    """Return what a run came to."""
    error = run.fact("error") if run.status in ("failed", "stopped") else None
    return {"status": run.status} | ({"error": error} if error else {}) | flat(run.fact("result"))


def _apart(a: PastRun, b: PastRun) -> Iterable[Difference]:
    """Return in how many attempts each was made: a resumed run is the run itself."""
    one, other = (len(found) if isinstance(found := run.fact("attempts"), list) else 0 for run in (a, b))
    return [Difference("attempts", one, other, counts=False)] if one != other else []
