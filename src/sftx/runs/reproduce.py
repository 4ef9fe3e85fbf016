"""Run a run again: what differs between then and now, where the new one goes, and whether the bits are the same."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from sftx.build import build
from sftx.config.check import config_from
from sftx.config.derive import flat, identity
from sftx.config.schema import TrainConfig
from sftx.data.corpus import Corpus
from sftx.data.digests import known_sha256
from sftx.data.sources import fetch, find_sources
from sftx.errors import DataError, ModelError, RunFolderError
from sftx.model import builtin
from sftx.model.find import local_folder
from sftx.model.load import find_model
from sftx.runs import manifest
from sftx.runs.compare import Difference, between, diff_words, environment_differences, weights_of
from sftx.runs.compare_metrics import Change, Metric, compare_records, first_change
from sftx.runs.folder import MANIFEST
from sftx.runs.launch import threads_each
from sftx.runs.past import CONFIG, PastRun, at, open_run
from sftx.runs.recipe import launched, masked, ranks_here
from sftx.runs.resume import adapter_hash
from sftx.secrets import scrub
from sftx.training.determinism import repeatability

MISSING = "missing"
DIGEST = re.compile(r"\b([0-9a-f]{16})[0-9a-f]{48}\b")
"""A SHA-256, of which the first letters are shown."""


@dataclass
class ThenAndNow:
    """What differs between a run and its repetition, before that begins."""

    machine: list[Difference] = field(default_factory=list)
    """Code, versions, hardware: the bits may differ."""
    content: list[Difference] = field(default_factory=list)
    """Settings, data, model: it is another run."""
    remarks: list[str] = field(default_factory=list)
    expected: str | None = None
    """What the repetition can be held to; None if the run did not store its device."""

    def __bool__(self) -> bool:
        return bool(self.machine or self.content)


def then_and_now(run: PastRun, config: TrainConfig, *, download: bool) -> ThenAndNow:
    """Compare what a run was made from with what is here; `download` fetches a model that is not."""
    found = ThenAndNow()
    stored = run.fact("environment")
    before, now = scrub(stored if isinstance(stored, dict) else {}), scrub(manifest.environment())  # hidden alike
    count = ranks_here(config)
    if count and count > 1 and not {"WORLD_SIZE", "OMP_NUM_THREADS"} & os.environ.keys():
        now["hardware"]["torch_threads"] = threads_each(count)  # the ranks', not this process's
    found.machine = environment_differences(before, now)
    found.content = [*_edited(run), *_masked(run, config), *_data(run, config), *_model(run, config, download=download)]
    found.remarks = list(_remarks(run, config, found.machine, now))
    device = run.fact("effective", "settings", "device")
    if device in ("cpu", "cuda"):
        found.expected = repeatability(device, deterministic=run.fact("effective", "settings", "deterministic") is True)
    return found


def _edited(run: PastRun) -> Iterator[Difference]:
    """Compare config.yaml with the settings that the manifest holds: a person may have changed one of them."""
    stored = run.fact("identity", "config")
    try:
        told = identity(config_from(run.config or {}), run.ranks, [], "", None)["config"]
    except KeyError:
        return
    now = scrub(json.loads(json.dumps(told)))
    for d in between(flat(stored), flat(now)):
        yield Difference(f"{CONFIG}, edited since: {d.key}", d.a, d.b)


def _masked(run: PastRun, config: TrainConfig) -> Iterator[Difference]:
    """Name what was not written down because it is secret, unless it was typed again."""
    still = set(masked(asdict(config)))
    for key in masked(run.config):
        if key in still:
            yield Difference(f"{CONFIG}: {key}", "a secret", "*** in its place: type it again, as key=value")


def _data(run: PastRun, config: TrainConfig) -> Iterator[Difference]:
    """Compare the content of each file with that of then."""
    told = run.fact("data")
    corpora = [c for c in told if isinstance(c, dict)] if isinstance(told, list) else []
    names = {"train_file_name": config.train_file_name, "eval_file_name": config.eval_file_name}
    for (key, name), then in zip_longest(names.items(), corpora[:2]):
        if name is None and then is None:
            continue
        before = _contents(then)
        try:
            now = [] if name is None else _contents_now(config, key, name)
        except DataError as error:
            yield Difference(f"data {_path(then)}", _short(_all(before)), f"{MISSING}: {error}{_looked_from(run)}")
            continue
        for x, y in zip_longest(before, now, fillvalue=(None, None)):
            if x[1] != y[1]:
                yield Difference(f"data {y[0] or x[0]}", _short(x[1] or "not used"), _short(y[1] or MISSING))


def _contents(corpus: Any) -> list[tuple[str | None, str | None]]:
    """Return (path, hash) of each file of a corpus, as a manifest holds them; of a stream, of all names and sizes."""
    if corpus is None:
        return []
    streamed = at(corpus, "names_and_sizes_sha256")
    if streamed:
        return [(_path(corpus), _named(streamed, "names and sizes"))]
    files = at(corpus, "files")
    known = [f for f in files if isinstance(f, dict)] if isinstance(files, list) else [corpus]
    return [(_path(f), _named(f.get("sha256"))) for f in known]


def _contents_now(config: TrainConfig, key: str, name: str | list[str]) -> list[tuple[str | None, str | None]]:
    corpus: Corpus = build(config.data)
    if corpus.streaming and key == "train_file_name":
        keep = not config.remove_unused_columns
        return _contents(corpus.stream(config.train_file_path, name, keep_columns=keep, limit=None).facts())
    sources = fetch(find_sources(config.train_file_path, name, key=key), key=key)
    return [(str(source.path), _named(known_sha256(source.path))) for source in sources]


def _named(digest: Any, what: str = "sha256") -> str:
    return f"{what} {digest}"


def _short(text: str) -> str:
    return DIGEST.sub(r"\1", text)


def _all(contents: list[tuple[str | None, str | None]]) -> str:
    return contents[0][1] or "" if len(contents) == 1 else f"{len(contents)} files"


def _path(corpus: Any) -> str:
    return str(at(corpus, "path"))


def _looked_from(run: PastRun) -> str:
    """Say from where relative paths were looked for."""
    if run.directory is None or run.directory == Path.cwd():
        return ""
    return f" Looked for from {run.directory}, where the run was started, and from here."


def _model(run: PastRun, config: TrainConfig, *, download: bool) -> Iterator[Difference]:
    """Compare the base model and the adapter to start from with those of then."""
    before = run.fact("identity", "model")
    name = config.model_name_or_path
    try:
        here = download or name == builtin.NAME or local_folder(name) is not None
        now = (
            find_model(name).fingerprint(code=config.trust_remote_code)
            if here
            else "not on this machine: it will be downloaded"
        )
    except ModelError as error:
        now = f"{MISSING}: {error}{_looked_from(run)}"
    if now != before:
        yield Difference(f"model {name}", f"fingerprint {before}", now)
    started_from = run.fact("identity", "adapter")
    try:
        adapter = adapter_hash(config.adapter)
    except ModelError as error:
        adapter = f"{MISSING}: {error}{_looked_from(run)}"
    if adapter != started_from:
        yield Difference(f"adapter {config.adapter}", started_from, adapter)


def _remarks(run: PastRun, config: TrainConfig, machine: list[Difference], now: dict[str, Any]) -> Iterator[str]:
    """Say what to do about a difference, and what is no difference but good to know."""
    differs = {d.key: d for d in machine}
    if "git.commit" in differs and differs["git.commit"].a:
        yield f"the run's code: git checkout {differs['git.commit'].a}"
    stored = at(run.fact("environment", "git"), "diff")
    if stored:
        like = "other" if "git.diff" in differs else "the same"
        if at(now, "git", "diff") == "":
            like = "no"
        yield (
            f"the run's code had uncommitted changes ({diff_words(run.fact('environment', 'git'))}): they are stored "
            f"in {run.path / MANIFEST} as environment.git.diff; today's checkout has {like} such changes"
        )
    threads = differs.get("hardware.torch_threads")
    if threads and isinstance(threads.a, int):
        yield f"sums depend on the number of threads: OMP_NUM_THREADS={threads.a} {launched(run)}"
    if run.ranks != ranks_here(config):
        yield f"the run was made by {run.ranks} processes: {launched(run)}"
    if run.status != "completed":
        yield f"the run is {run.status}: its last recorded step is {run.last_step}; what both have is compared"


def output_of(run: PastRun, asked: str | None) -> Path:
    """Return where to train: what was asked for, or the first free `RUN-repro`, `RUN-repro-2`, ... beside the run.

    A repetition that was stopped is gone on with.

    Errors:
        RunFolderError: the folder asked for is the run itself, or holds a finished run.
    """
    if asked is None:
        base = Path(os.path.abspath(run.path))  # noqa: PTH100 - a link's own name, not what it leads to
        number = 1
        while (folder := base.with_name(f"{base.name}-repro" + (f"-{number}" if number > 1 else ""))).exists():
            if _is_unfinished(folder):
                break
            number += 1
        return folder
    folder = Path(asked)
    if folder.exists() and folder.samefile(run.path):
        raise RunFolderError(f"--output_dir {asked}: is the run itself; name a new folder.")
    if (folder / MANIFEST).is_file() and not _is_unfinished(folder):
        raise RunFolderError(
            f"--output_dir {asked}: holds a run already; name a new folder. To compare: sftx diff {run.path} {asked}"
        )
    return folder


def _is_unfinished(folder: Path) -> bool:
    """Tell whether a folder holds a repetition that a signal or a crash has stopped."""
    try:
        there = open_run(folder)
    except RunFolderError:
        return False
    begun = str(there.fact("command")).startswith("sftx repro ")
    return begun and there.status in ("running", "stopped") and at(there.config, "resume") == "auto"


@dataclass(frozen=True)
class Verdict:
    """Whether a run came to the same bits again."""

    same: bool
    first: Change | None
    metrics: list[Metric]
    weights: list[Difference]
    compared_weights: bool
    shared_steps: int


def judge(old: PastRun, new: PastRun) -> Verdict:
    """Compare every recorded metric but speed, and the weights in `final/`; of an unfinished run, what both have.

    A run that was gone on with to a larger max_steps was also evaluated where it ended first.
    """
    metrics = compare_records(old.records, new.records)
    first = first_change(metrics)
    before, after = weights_of(old), weights_of(new)
    weights = between(before, after) if before else []
    shared = len(old.records.keys() & new.records.keys())
    attempts = old.fact("attempts")
    went_on = isinstance(attempts, list) and len(attempts) > 1
    if old.status != "completed":
        whole = True
    elif went_on:
        whole = all(m.steps_b == m.shared for m in metrics)
    else:
        whole = not any(m.differs for m in metrics)
    same = first is None and whole and not weights and bool(shared or before)
    return Verdict(same, first, metrics, weights, bool(before), shared)
