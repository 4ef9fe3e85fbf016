"""A saved run's `config.yaml` as the configuration of a new run: unchanged, and checked as untrusted."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sftx.config.checks.check import check_tree, config_from
from sftx.config.composition.grammar import read_override
from sftx.config.composition.yaml_file import read_yaml
from sftx.config.derive import PATHS
from sftx.config.schema import TrainConfig
from sftx.config.trees import nodes
from sftx.config.untrusted.allowlist import cure
from sftx.config.untrusted.file_keys import TYPED_ONLY, file_problems
from sftx.config.values import Deleted, Origin, Sweep, show
from sftx.errors import ConfigError, RunFolderError, did_you_mean
from sftx.runs.launch import count_ranks
from sftx.runs.manifest import git_state
from sftx.runs.saved.saved_run import CONFIG, SavedRun
from sftx.secrets import HIDDEN
from sftx.training.saving.run_folder import MANIFEST

RELATIVE = ("train_file_path", "model_name_or_path", "adapter", "resume")
"""Settings that may be paths relative to where the run was started; the other paths are relative to these."""


def rerun_config(run: SavedRun, words: Sequence[str]) -> TrainConfig:
    """Return the configuration of a saved run, checked as any untrusted configuration is.

    `words` are settings that were typed: privileges, which a file cannot give; paths; what was masked.

    Raises:
        RunFolderError: its config or its manifest cannot be read.
        ConfigError: every problem of its config, and of what was typed.
    """
    for file in (CONFIG, MANIFEST):
        if file in run.problems:
            raise RunFolderError(f"{run.problems[file]} Without it the run cannot be repeated.")
    place = read_yaml(run.path / CONFIG).place
    typed, problems = _typed(words, run)
    tree = deepcopy(run.config)
    problems += _privileges(tree, typed, run, place)
    problems += file_problems({k: v for k, v in tree.items() if k not in TYPED_ONLY}, place)
    interpolated = [
        f"{place(key)}: `{key}`: holds an interpolation; what a run leaves holds none, so this was put there since."
        for key, name, value in nodes(tree)
        if "${" in name or (isinstance(value, str) and "${" in value)
    ]
    problems += [problem for key, value in typed.items() if (problem := _put(tree, key, value))]
    problems += interpolated or _checked(tree, place, run)  # an interpolation is not resolved to see what it does
    if problems:
        raise ConfigError(problems)
    values = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)  # what was typed may be `${oc.env:NAME}`
    assert isinstance(values, dict)
    return config_from(values)


def from_its_directory(config: TrainConfig, run: SavedRun, words: Sequence[str], here: Path) -> TrainConfig:
    """Resolve relative paths from where the run was started, where something exists there.

    What was typed is relative to here. The manifest is believed about where to look for data, and about nothing else:
    nothing is imported from there.
    """
    typed = [word.partition("=")[0] for word in words]
    if run.directory is None or run.directory == here:
        return config
    changed: dict[str, Any] = {}
    for key in RELATIVE:
        value = getattr(config, key)
        if isinstance(value, str) and key not in typed and not Path(value).expanduser().is_absolute():
            place = run.directory / value
            if (key != "resume" or value not in ("auto", "never")) and place.exists():
                changed[key] = str(place)
    return replace(config, **changed)


def masked(tree: Any) -> Iterator[str]:
    """Yield the keys whose values were not written down because they are secret."""
    for key, name, value in nodes(tree):
        if HIDDEN in name or (isinstance(value, str) and HIDDEN in value):
            yield key


def command(run: SavedRun, *words: str) -> str:
    """Return the command that repeats a run."""
    return shlex.join(["sftx", "repro", str(run.path), *words])


def launched(run: SavedRun) -> str:
    """Return the command that repeats a run with as many processes as it had."""
    return command(run) if run.ranks == 1 else f"torchrun --nproc_per_node {run.ranks} -m {command(run)}"


def ranks_here(config: TrainConfig | None = None) -> int | None:
    """Return how many processes a launcher has started, or the configuration starts; None if that is not known."""
    started = os.environ.get("WORLD_SIZE")
    if started:
        return int(started)
    return None if config is None else count_ranks(config)


def check_ranks(run: SavedRun, here: int | None) -> None:
    """Raise unless there are as many processes as the run had.

    Raises:
        RunFolderError: there are more or fewer; the message gives the command.
    """
    if here not in (None, run.ranks):
        how = "one process" if run.ranks == 1 else f"{run.ranks} processes"
        raise RunFolderError(f"{run.path} was made by {how}, here are {here}. Type: {launched(run)}")


def _typed(words: Sequence[str], run: SavedRun) -> tuple[dict[str, Any], list[str]]:
    """Read the settings that were typed; return them, and what is wrong."""
    allowed = {*PATHS, *TYPED_ONLY, *masked(run.config)} - {"output_dir"}
    typed: dict[str, Any] = {}
    problems = []
    for word in words:
        found = read_override(word, multirun=False)
        if found is None or isinstance(found.value, Deleted | Sweep) or found.prefix:
            problems.append(f"command line: {word!r}: expected key=value.")
        elif found.name == "output_dir":
            problems.append(f"command line: `{word}`: where to train is given by --output_dir {show(found.value)}")
        elif found.name not in allowed:
            near = did_you_mean(found.name, allowed)
            problems.append(
                f"command line: `{found.name}`: a run is repeated as it was; this is not to be changed.{near} "
                f"Can be typed: {', '.join(sorted(allowed))}."
            )
        else:
            typed[found.name] = found.value
    return typed, problems


def _privileges(tree: dict[str, Any], typed: dict[str, Any], run: SavedRun, place: Origin) -> list[str]:
    """Replace what only a person may set by what was typed, and say what must be typed again."""
    problems = []
    for key, unset in TYPED_ONLY.items():
        recorded, given = tree.get(key, unset), typed.get(key, unset)
        tree[key] = given
        if recorded != unset and key not in typed:
            patterns = [p for p in recorded if isinstance(p, str)] if isinstance(recorded, list) else []
            warnings = [warning for p in patterns if (warning := cure(p)).startswith("Do not")]
            again = command(run, f"{key}={show(recorded)}")
            problems.append(
                f"{place(key)}: `{key}`: the run had {show(recorded)}, but a file cannot give this. "
                + (warnings[0] if warnings else f"If you have read what it lets run, type it again: {again}")
            )
        elif key == "trust_remote_code" and given != recorded:
            problems.append(f"command line: `{key}={show(given)}`: the run had {show(recorded)}.")
    return problems


def _checked(tree: dict[str, Any], place: Origin, run: SavedRun) -> list[str]:
    """Check the settings; after the last problem, name the commit that the run was made at, if it is another."""
    try:
        problems = check_tree(OmegaConf.create(tree), place)
    except (OmegaConfBaseException, RecursionError) as error:
        problems = [f"{place('')}: {str(error).splitlines()[0]}"]
    commit = run.fact("environment", "git", "commit")
    if problems and isinstance(commit, str) and commit != git_state().get("commit"):
        problems[-1] += f"\nThe run was made at another commit: git checkout {commit}"
    return problems


def _put(tree: Any, key: str, value: Any) -> str | None:
    """Put a value where a dotted key leads, in mappings and lists; return why that cannot be."""
    *parts, last = key.split(".")
    try:
        for part in parts:
            tree = tree[int(part)] if isinstance(tree, list) else tree[part]
        tree[int(last) if isinstance(tree, list) else last] = value
    except (LookupError, ValueError, TypeError):  # a name in a mapping may itself hold dots
        return f"command line: `{key}`: cannot be typed; write it into the run's {CONFIG} and use --anyway."
    return None
