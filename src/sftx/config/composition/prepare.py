"""From `sys.argv` to a checked command line: every problem is reported before anything heavy is imported."""

from __future__ import annotations

import json
import shlex
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from hydra.core.override_parser.types import IntervalSweep
from omegaconf import DictConfig, OmegaConf

from sftx import train_command
from sftx.config.checks.hydra_keys import check_key
from sftx.config.checks.interface import name_own_components
from sftx.config.checks.unused import Uses
from sftx.config.composition import source
from sftx.config.composition.aliases import PrecisionExcept, plain_name, resolve_precision
from sftx.config.composition.by_hydra import (
    COMPOSITION_ERRORS,
    CONFIG_NAME,
    first_sentence,
    load,
    register_sources,
    with_overrides,
)
from sftx.config.composition.command_line import CommandLine, bare, override_text, read_command_line
from sftx.config.composition.grammar import brings_keys, read_override
from sftx.config.composition.overlays import Reading, known_values
from sftx.config.composition.sweeps import Axes, Point, check_space, first_point, is_sweep, values_of
from sftx.config.composition.yaml_file import interpolation_problem
from sftx.config.derive import PATHS
from sftx.config.options import ALL_GROUPS, family_of_type, options, unknown_option, user_folders
from sftx.config.untrusted.file_keys import TYPED_ONLY, placed_elsewhere
from sftx.config.untrusted.guard import guard
from sftx.config.values import Deleted, Sweep, each, over, show
from sftx.errors import did_you_mean, raise_problems
from sftx.secrets import scrub_text

__all__ = ["CONFIG_NAME", "Request", "compose_checked", "family_of_type", "options", "prepare"]


@dataclass
class Request:
    """A command line that will compose: what Hydra gets, and the notes on it."""

    argv: list[str]
    notes: list[str]
    multirun: bool
    overrides: list[str] = field(default_factory=list)
    typed: list[str] = field(default_factory=list)
    """The words after the program as the user typed them."""
    places: dict[str, str] = field(default_factory=dict)
    """Key -> `file:line`, of the paths that the JSON file or an experiment sets."""
    privileges: dict[str, Any] = field(default_factory=lambda: dict(TYPED_ONLY))
    """What only a person may set, as it was typed: `allow_targets`, `trust_remote_code`."""
    shown: str | None = None
    """What `--cfg job` prints: it is composed already, and Hydra would take as long again."""
    composed: tuple[DictConfig, DictConfig] | None = None
    """What a single run runs, and Hydra's own node: it is composed and checked already."""

    def command(self) -> str:
        """Return the command, ready to be typed again."""
        return f"{train_command()} {shlex.join(self.typed)}".rstrip()


def prepare(argv: list[str]) -> Request:
    """Check a command line as a whole and return what Hydra shall run.

    Raises:
        ConfigError: every problem found in any source (command line, JSON, experiment, sweep).
    """
    return _prepared(argv)[0]


def compose_checked(argv: list[str]) -> DictConfig:
    """Compose a command line's configuration, a sweep's at its first point, for tests and notebooks."""
    return _prepared(argv)[1]


def _prepared(argv: list[str]) -> tuple[Request, DictConfig]:
    register_sources()
    line = read_command_line(argv)
    user_folders[:] = line.folders
    if line.bypass:
        raise_problems(line.problems)
        # nothing is checked here: only completion, which runs nothing, is given what was typed
        words = line.flags + (line.texts if line.completes else [])
        return Request(words, line.notes, False, [], list(argv)), OmegaConf.create()
    return _Preparation(line).finish(argv)


class _Preparation:
    """One command line on its way to a request; problems are collected, and what is right goes on."""

    def __init__(self, line: CommandLine) -> None:
        self.line = line
        self.reading = Reading()
        self.problems = line.problems
        self.multirun = line.multirun
        self.axes: Axes = {}
        self.privileges = {k: line.values.get(k, unset) for k, unset in TYPED_ONLY.items()}
        self.hydra = OmegaConf.create()
        """Hydra's own node of the last composition."""
        self.uses = Uses({}, self._typed, self.origin)

    def finish(self, argv: list[str]) -> tuple[Request, DictConfig]:
        """Check everything; return what Hydra shall run, and the configuration at the first point."""
        line = self.line
        self._drop_unknown()
        with source.collecting(frozenset(map(bare, line.values))) as self.reading:
            base = self._first_composition()
            if base is not None:
                point = first_point(self.axes)
                self.uses = Uses(self.axes, self._typed, self.origin)
                self.problems += check_space(
                    self.axes, lambda p: base if p == point else self._compose(p), self.origin, self.uses
                )
        raise_problems(self.problems + self.reading.problems)
        assert base is not None
        name_own_components(base)
        repeats = self.uses.repeats() if self.multirun and not self._searches() else []
        notes = list(dict.fromkeys(line.notes + self.reading.notes + self.uses.notes() + repeats))
        values, flags = dict(line.values), line.flags
        if line.shows:  # a sweep is shown at its first point
            values |= first_point(self.axes)
            flags = [f for f in flags if f not in ("-m", "--multirun")]
        overrides = [override_text(self._key_for_hydra(k, v), v) for k, v in values.items()]
        shown = _as_yaml(base, resolve="--resolve" in flags) if _shows_job(flags) else None
        multirun = self.multirun and not line.shows
        left_to_hydra = flags or multirun or self.hydra.callbacks
        composed = None if left_to_hydra else (base, with_overrides(self.hydra, overrides))
        places = {k: self.origin(k) for k in (*PATHS, "resume") if k in self._typed()}
        places = {k: place for k, place in places.items() if not place.startswith("command line")}
        request = Request(
            flags + overrides, notes, multirun, overrides, list(argv), places, self.privileges, shown, composed
        )
        return request, base

    def origin(self, key: str) -> str:
        """Return where a key got its value: the command line, the JSON file, or a YAML file and line."""
        parts, name = key.split("."), plain_name(key)
        for n in range(len(parts), 0, -1):
            head = plain_name(".".join(parts[:n]))
            if head in self.line.origins:
                return self.line.origins[head]
        below = next((k for k in self.line.origins if k.startswith(f"{key}.")), None)
        if below:
            return self.line.origins[below]
        place = self.reading.places.get(name) or self.reading.place_of(key) or self.reading.place_of(name)
        return place or "config"

    def _searches(self) -> bool:
        """Return True if an algorithm chooses the points of the sweep."""
        return str(self.hydra.runtime.choices.get("hydra/sweeper", "basic")) != "basic"

    def _typed(self) -> list[str]:
        """Return the keys that the command line, the JSON file and the experiment set."""
        experiments = [file for layer, file, _ in self.reading.loaded if layer == source.LAYERS["experiment"]]
        return [*self.line.origins, *(key for file in experiments for key in file.settings())]

    def _drop_unknown(self) -> None:
        """Report typed options, groups and Hydra keys that do not exist, and go on without them."""
        for key, value in list(self.line.values.items()):
            problem = _problem_of(key, value, self.line.origin(key))
            if problem:
                self.problems.append(problem)
                del self.line.values[key]
            elif bare(key) in ALL_GROUPS and not isinstance(value, dict):
                self._drop_unknown_options(key, value)

    def _drop_unknown_options(self, key: str, value: Any) -> None:
        group, gathered = bare(key), Reading()
        kept = over(value, lambda v: "fp32" if isinstance(v, PrecisionExcept) else v)
        known = known_values(group, kept, self.line.origin(key), gathered)
        self.problems += gathered.problems
        if known is None:  # no valid option, or null: no overlay, as when nothing is typed
            del self.line.values[key]
        elif is_sweep(value):
            valid = (v for v in each(value) if isinstance(v, PrecisionExcept) or _is_option(group, v))
            self.line.values[key] = Sweep(tuple(valid))

    def _compose(self, point: Point) -> DictConfig | None:
        """Compose at a point of the sweep; a setting that Hydra refuses is reported and left out."""
        values = self.line.values | point
        while True:
            self.reading.loaded.clear()
            texts = {k: override_text(_lenient_key(k, v), v) for k, v in values.items()}
            try:
                cfg, self.hydra = load(list(texts.values()))
                self.problems += guard(cfg, self.hydra, self.privileges, self.origin)
                return cfg
            except COMPOSITION_ERRORS as error:
                culprit = self._culprit(error, texts)
                where = self.line.origin(culprit) if culprit else "config"
                self.problems.append(f"{where}: {first_sentence(error)}")
                if culprit is None:
                    return None
                values.pop(culprit)
                self.line.values.pop(culprit, None)
                self.axes.pop(culprit, None)

    def _guard_sweep(self) -> None:
        """Guard what Hydra starts a sweep with: the composition without what is swept."""
        if not self.axes:
            return
        texts = [override_text(_lenient_key(k, v), v) for k, v in self.line.values.items() if k not in self.axes]
        loaded = list(self.reading.loaded)
        with suppress(*COMPOSITION_ERRORS):  # Hydra will fail as well, and run nothing
            self.problems += guard(*load(texts), self.privileges, self.origin)
        self.reading.loaded[:] = loaded

    def _culprit(self, error: Exception, texts: dict[str, str]) -> str | None:
        """Return the setting without which the configuration composes, or fails otherwise."""
        for key in reversed(texts):
            try:
                load([t for k, t in texts.items() if k != key])
            except COMPOSITION_ERRORS as other:
                if first_sentence(other) == first_sentence(error):
                    continue
            return key
        return None

    def _first_composition(self) -> DictConfig | None:
        """Compose the first point, once what depends on the chosen experiment or model is decided."""
        values = self.line.values
        self.axes = {k: values_of(v) for k, v in values.items() if is_sweep(v)}
        open_precision = any(isinstance(v, PrecisionExcept) for v in each(values.get("precision")))
        precision = values.pop("precision") if open_precision else None
        typed_precision = self.axes.pop("precision", ()) if open_precision else ()
        base = self._compose(first_point(self.axes))
        if base is None:
            return None
        complete = not typed_precision
        if open_precision:
            below = self.hydra.runtime.choices.precision
            resolved = resolve_precision(precision, below)
            if typed_precision:
                self.axes["precision"] = values_of(resolved)
            if resolved != below:
                values["precision"] = resolved
                complete = False
        complete &= not self._add_file_axes()
        complete &= not self._follow_family(base)
        self._guard_sweep()
        return base if complete else self._compose(first_point(self.axes))

    def _add_file_axes(self) -> bool:
        """Take in the search space that a file holds, and decide if this is a multirun; return True if it grew."""
        self.multirun |= str(self.hydra.mode or "").endswith("MULTIRUN")
        sweeper = OmegaConf.to_container(self.hydra.sweeper, resolve=False)
        params = (sweeper.get("params") if isinstance(sweeper, dict) else None) or {}
        if not self.multirun:
            for key in self.axes:
                self.problems.append(
                    f"{self.line.origin(key)}: several values are a sweep: add -m, or write a list as [a,b], "
                    f"or quote a comma that belongs to the value: {key}=\"'a,b'\"."
                )
            if params:
                self.line.notes.append("the search space in hydra.sweeper.params is not used: add -m")
            return False
        for key in [k for k in self.axes if bare(k).startswith("hydra")]:
            self.problems.append(f"{self.line.origin(key)}: Hydra's own settings cannot be swept.")
            del self.axes[key]
        grew = False
        listing_only = self.hydra.runtime.choices.get("hydra/sweeper") == "basic"
        intervals = [k for k, v in self.line.values.items() if isinstance(v, IntervalSweep)]
        for key, value in params.items():
            key = bare(str(key))
            typed = read_override(f"{key}={value}", multirun=True)
            if typed is not None and key not in self.line.values:
                intervals += [key] if isinstance(typed.value, IntervalSweep) else []
                self.axes[key] = values_of(typed.value) if is_sweep(typed.value) else (typed.value,)
                grew = True
        for key in intervals if listing_only else ():
            self.problems.append(
                f"{self.origin(key)}: an interval needs a search algorithm (hydra/sweeper); "
                f"without one, list values: {key}=1,2,3 or {key}=range(1,4)."
            )
        return grew

    def _follow_family(self, base: DictConfig) -> bool:
        """Choose `model=` by the folder's own model_type, unless a person chose; return True if that changes it."""
        if {"model"} & (self.line.values.keys() | self.axes.keys() | self.reading.chosen):
            return False
        raw = OmegaConf.to_container(base, resolve=False)
        assert isinstance(raw, dict)
        names = self.axes.get("model_name_or_path", (raw.get("model_name_or_path"),))
        families = {f for f in (_family_of(str(n)) for n in names) if f is not None}
        origin = self.origin("model_name_or_path")
        if len(families) > 1:
            self.problems.append(
                f"{origin}: these models are of different families ({', '.join(sorted(families))}): "
                f"run one sweep for each."
            )
        if len(families) != 1 or self.hydra.runtime.choices.model in families:
            return False
        self.line.values["model"] = families.pop()
        self.line.origins["model"] = origin
        return True

    def _key_for_hydra(self, key: str, value: Any) -> str:
        """Mark an addition: a key that no file sets, but its component takes; a mapping, which may bring new keys."""
        if brings_keys(value):
            return _lenient_key(key, value)
        is_plain = key in ALL_GROUPS or "." not in key or key != bare(key) or key.startswith("hydra")
        return key if is_plain or isinstance(value, Deleted) or self.reading.place_of(key) else f"++{key}"


def _problem_of(key: str, value: Any, origin: str) -> str | None:
    """Return what is wrong with a typed setting that Hydra would refuse, or would not report together with others."""
    name = bare(key)
    if name in TYPED_ONLY and is_sweep(value):
        return f"{origin}: `{key}`: this is for all trials: it cannot be swept."
    if misplaced := placed_elsewhere(key):
        return f"{origin}: {misplaced}"
    if name == "hydra":
        return f"{origin}: type Hydra's keys one by one, for example hydra.sweep.dir=FOLDER."
    if reason := interpolation_problem(value):
        return f"{origin}: `{key}`: {show(value)} is no interpolation: {reason}."
    if isinstance(value, Sweep) and not value.values:
        return f"{origin}: `{key}`: a sweep over no values at all."
    if name.startswith("hydra/"):
        return unknown_option(name, value, origin)
    if name.startswith("hydra.") and not isinstance(value, Deleted):
        return check_key(name.removeprefix("hydra."), value, origin)
    if "/" in name and name not in ALL_GROUPS:
        return f"{origin}: there is no config group `{name}`.{did_you_mean(name, ALL_GROUPS)}"
    return None


def _shows_job(flags: list[str]) -> bool:
    """True for `--cfg job` without flags that only Hydra knows, such as `--package`."""
    words = [w for flag in flags for w in flag.split("=")]
    return "job" in words and {"--cfg", "-c"} & {*words} != set() and {*words} <= {"--cfg", "-c", "job", "--resolve"}


def _as_yaml(cfg: DictConfig, *, resolve: bool) -> str:
    if resolve:
        cfg = cfg.copy()
        OmegaConf.resolve(cfg)
        return scrub_text(OmegaConf.to_yaml(cfg))  # often sent into a file
    return OmegaConf.to_yaml(cfg)


def _lenient_key(key: str, value: Any) -> str:
    """Let every key be added, so that the check sees all unknown ones and not only Hydra's first."""
    is_group = key in ALL_GROUPS and not isinstance(value, dict)
    is_hydra = key.startswith(("hydra.", "hydra/")) and not brings_keys(value)
    is_value = key == bare(key) and not is_group and not is_hydra
    return f"++{key}" if is_value and not isinstance(value, Deleted) else key


def _is_option(group: str, value: Any) -> bool:
    chosen = value if isinstance(value, list) else [value]
    return value is not None and all(unknown_option(group, option, "") is None for option in chosen)


def _family_of(name: str) -> str | None:
    """Return the family option whose `model_types` hold a local model's own type; None when not local."""
    from sftx.model_folders import local_folder  # light: looks at folders only

    folder = local_folder(name)
    if folder is None or not (folder / "config.json").is_file():
        return None
    try:
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (ValueError, KeyError, OSError):
        return None  # reported when the model is loaded
    return family_of_type(model_type) or "generic"
