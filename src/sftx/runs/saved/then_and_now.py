"""What differs between a saved run and its repetition before that begins, and where the repetition is trained."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from sftx.build import build
from sftx.config.checks.check import config_from
from sftx.config.derive import identity
from sftx.config.schema import TrainConfig
from sftx.config.trees import flat
from sftx.data.corpus import Corpus
from sftx.data.files.sources import fetch, find_sources
from sftx.data.store.digests import known_sha256
from sftx.errors import DataError, ModelError, RunFolderError
from sftx.model.loading import builtin
from sftx.model.loading.load import find_model
from sftx.model_folders import local_folder
from sftx.runs import manifest
from sftx.runs.launch import threads_each
from sftx.runs.resume import adapter_hash
from sftx.runs.saved.comparison import Difference, between, data_differences, diff_words, environment_differences
from sftx.runs.saved.rerun import launched, masked, ranks_here
from sftx.runs.saved.saved_run import CONFIG, SavedRun, at, open_run
from sftx.secrets import scrub
from sftx.training.determinism import repeatability
from sftx.training.saving.run_folder import MANIFEST


@dataclass
class ThenAndNow:
    """What differs between a run and its repetition, before that begins."""

    machine: list[Difference] = field(default_factory=list)
    """Code, versions, hardware: the bits may differ."""
    content: list[Difference] = field(default_factory=list)
    """Settings, data, model: it is another run."""
    remarks: list[str] = field(default_factory=list)
    expected: str | None = None
    """How equal the repetition should be; None if the run did not store its device."""

    def __bool__(self) -> bool:
        return bool(self.machine or self.content)


def then_and_now(run: SavedRun, config: TrainConfig, *, download: bool) -> ThenAndNow:
    """Compare what a run was made from with what is here; `download` fetches a model that is not."""
    ranks = ranks_here(config)
    environment = manifest.environment()
    if ranks and ranks > 1 and not {"WORLD_SIZE", "OMP_NUM_THREADS"} & os.environ.keys():
        environment["hardware"]["torch_threads"] = threads_each(ranks)  # the ranks', not this process's
    now = scrub({"environment": environment, "ranks": ranks or run.ranks, "data": _data(run, config)})
    then = {"environment": scrub(run.fact("environment")), "ranks": run.ranks, "data": run.fact("data")}
    device = run.fact("effective", "settings", "device")
    deterministic = run.fact("effective", "settings", "deterministic") is True
    machine = environment_differences(then, now)
    return ThenAndNow(
        machine,
        [*_settings(run, config), *data_differences(then, now), *_model(run, config, download=download)],
        list(_remarks(run, config, machine, now)),
        repeatability(device, deterministic=deterministic) if device in ("cpu", "cuda") else None,
    )


def _settings(run: SavedRun, config: TrainConfig) -> Iterator[Difference]:
    """Compare config.yaml with the settings in the manifest: a person may have edited it, or a secret is masked."""
    try:
        stored = identity(config_from(run.config), run.ranks, [], "", None)["config"]
    except KeyError:
        stored = None
    if stored is not None:
        for d in between(flat(run.fact("identity", "config")), flat(scrub(json.loads(json.dumps(stored))))):
            yield Difference(f"{CONFIG}, edited since: {d.key}", d.a, d.b)
    still_masked = set(masked(asdict(config)))
    for key in masked(run.config):
        if key in still_masked:
            yield Difference(f"{CONFIG}: {key}", "a secret", "*** in its place: type it again, as key=value")


def _data(run: SavedRun, config: TrainConfig) -> list[dict[str, Any]]:
    """Return the corpora that are here as a manifest holds them, as far as that is known without reading rows."""
    corpora = []
    names = {"train_file_name": config.train_file_name, "eval_file_name": config.eval_file_name}
    corpus: Corpus = build(config.data)
    for key, name in names.items():
        if name is None:
            continue
        try:
            if corpus.streaming and key == "train_file_name":
                keep = not config.remove_unused_columns
                corpora.append(corpus.stream(config.train_file_path, name, keep_columns=keep, limit=None).facts())
                continue
            sources = fetch(find_sources(config.train_file_path, name, key=key), key=key)
            files = [{"path": str(source.path), "sha256": known_sha256(source.path)} for source in sources]
        except DataError as error:
            files = [{"path": str(name), "missing": f"missing: {error}{_looked_from(run)}"}]
        corpora.append({"path": config.train_file_path, "files": files})
    return corpora


def _looked_from(run: SavedRun) -> str:
    if run.directory is None or run.directory == Path.cwd():
        return ""
    return f" Looked for from {run.directory}, where the run was started, and from here."


def _model(run: SavedRun, config: TrainConfig, *, download: bool) -> list[Difference]:
    """Compare the base model and the adapter to start from with those of then."""
    name = config.model_name_or_path
    then = {f"model {name}": f"fingerprint {run.fact('identity', 'model')}"}
    then[f"adapter {config.adapter}"] = run.fact("identity", "adapter")
    now: dict[str, Any] = {}
    try:
        now[f"model {name}"] = "not on this machine: it will be downloaded"
        if download or name == builtin.NAME or local_folder(name) is not None:
            now[f"model {name}"] = f"fingerprint {find_model(name).fingerprint(code=config.trust_remote_code)}"
    except ModelError as error:
        now[f"model {name}"] = f"missing: {error}{_looked_from(run)}"
    try:
        now[f"adapter {config.adapter}"] = adapter_hash(config.adapter)
    except ModelError as error:
        now[f"adapter {config.adapter}"] = f"missing: {error}{_looked_from(run)}"
    return between(then, now)


def _remarks(run: SavedRun, config: TrainConfig, machine: list[Difference], now: dict[str, Any]) -> Iterator[str]:
    """Say what to do about a difference, and what is no difference but good to know."""
    differs = {d.key: d for d in machine}
    if "git.commit" in differs and differs["git.commit"].a:
        yield f"the run's code: git checkout {differs['git.commit'].a}"
    git = run.fact("environment", "git")
    if at(git, "diff"):
        like = "other" if "git.diff" in differs else "the same"
        like = "no" if at(now, "environment", "git", "diff") == "" else like
        yield (
            f"the run's code had uncommitted changes ({diff_words(git)}): they are stored in {run.path / MANIFEST} as "
            f"environment.git.diff; today's checkout has {like} such changes"
        )
    threads = differs.get("hardware.torch_threads")
    if threads and isinstance(threads.a, int):
        yield f"sums depend on the number of threads: OMP_NUM_THREADS={threads.a} {launched(run)}"
    if run.ranks != ranks_here(config):
        yield f"the run was made by {run.ranks} processes: {launched(run)}"
    if run.status != "completed":
        yield f"the run is {run.status}: its last recorded step is {run.last_step}; what both have is compared"


def output_of(run: SavedRun, requested: str | None) -> Path:
    """Return where to train: as requested, or the first free `RUN-repro`, `RUN-repro-2`, ... beside the run.

    A repetition that was stopped is continued.

    Raises:
        RunFolderError: the requested folder is the run itself, or holds a finished run.
    """
    if requested is None:
        base = Path(os.path.abspath(run.path))  # noqa: PTH100 - a link's own name, not what it leads to
        names = (f"{base.name}-repro" + (f"-{number}" if number > 1 else "") for number in count(1))
        return next(f for f in map(base.with_name, names) if not f.exists() or _is_unfinished(f))
    folder = Path(requested)
    if folder.exists() and folder.samefile(run.path):
        raise RunFolderError(f"--output_dir {requested}: is the run itself; name a new folder.")
    if (folder / MANIFEST).is_file() and not _is_unfinished(folder):
        raise RunFolderError(
            f"--output_dir {requested}: holds a run already; name a new folder. "
            f"To compare: sftx diff {run.path} {requested}"
        )
    return folder


def _is_unfinished(folder: Path) -> bool:
    """Return True if a folder holds a repetition that a signal or a crash has stopped."""
    try:
        there = open_run(folder)
    except RunFolderError:
        return False
    begun = str(there.fact("command")).startswith("sftx repro ")
    return begun and there.status in ("running", "stopped") and there.config.get("resume") == "auto"
