"""Settings that have no effect in their configuration, and sweeps that train the same model twice."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice, product
from typing import Any

from sftx.config.checks.check import Tree, check_knob
from sftx.config.checks.rules import evaluates
from sftx.config.composition.aliases import MIRRORS
from sftx.config.options import ALL_GROUPS, component_of
from sftx.config.schema import KNOBS
from sftx.config.trees import MISSING, get, nodes, replaced
from sftx.config.values import Origin, show

Values = dict[str, Any]

COMPONENT_KNOBS = {
    "lora_rank": "mode", "lora_alpha": "mode", "lora_dropout": "mode", "lora_target_modules": "mode",
    "warmup_steps": "scheduler",
    "weight_decay": "optimizer",
}  # fmt: skip
"""Knobs that act only through a component that refers to them, each with the group of that component."""
MOST_POINTS = 20_000
"""Points of a sweep that are looked at."""


@dataclass(frozen=True)
class Row:
    """Keys that have no effect in some configurations: `why` returns the reason, or None where they have one."""

    keys: tuple[str, ...]
    reads: tuple[str, ...]
    """What `why` looks at."""
    why: Callable[[Values], str | None]


def _when(condition: Callable[[Values], Any], reason: str) -> Callable[[Values], str | None]:
    return lambda v: reason if condition(v) else None


def _not_by_steps(v: Values) -> str | None:
    if v["save_strategy"] == "epoch":
        return "save_strategy=epoch saves after each epoch"
    return NO_CHECKPOINTS if v["save_strategy"] == "no" else None


def _not_by_time(v: Values) -> str | None:
    return _not_by_steps(v) or (None if v["save_steps"] == "auto" else "it is for save_steps=auto")


def _template_of_family(v: Values) -> str | None:
    from sftx.model_folders import brings_template  # light: looks at a folder only

    if v["template_name"] is not None:
        return f"template_name={v['template_name']} is used"
    name = v["model_name_or_path"]
    return f"{name} brings its own template; template_name= replaces it" if brings_template(name) else None


NO_CHECKPOINTS = "save_strategy=no saves no checkpoints"
NO_EVALUATION = "there is no evaluation: eval_ratio is 0, and eval_file_name names no file"
ROWS = (
    Row(
        ("final_dtype",), ("train_mode",),
        _when(lambda v: v["train_mode"] != "full", "it is for mode=full: an adapter keeps its own"),
    ),
    Row(("save_steps",), ("save_strategy",), _not_by_steps),
    Row(("lost_work_minutes",), ("save_strategy", "save_steps"), _not_by_time),
    Row(
        ("save_total_limit", "async_save"), ("save_strategy",),
        _when(lambda v: v["save_strategy"] == "no", NO_CHECKPOINTS),
    ),
    Row(
        ("eval_steps", "eval_max_rows"), ("eval_ratio", "eval_file_name"),
        _when(lambda v: not evaluates(v), NO_EVALUATION),
    ),
    Row(
        ("eval_ratio",), ("eval_file_name",),
        lambda v: f"eval_file_name={show(v['eval_file_name'])} is held out" if v["eval_file_name"] else None,
    ),
    Row(
        ("num_train_epochs",), ("max_steps",),
        lambda v: f"max_steps={v['max_steps']} ends the run" if v["max_steps"] is not None else None,
    ),
    Row(("model.template",), ("template_name", "model_name_or_path"), _template_of_family),
    Row(("on_tracker_error",), ("tracker",), _when(lambda v: not v["tracker"], "no tracker is chosen")),
    Row(
        ("data.near_threshold",), ("data.duplicates",),
        _when(lambda v: v["data"].get("duplicates") != "drop_near", "it is for data.duplicates=drop_near"),
    ),
    Row(
        ("data.shuffle_window",), ("data.streaming",),
        _when(lambda v: not v["data"].get("streaming"), "it is for data.streaming=true"),
    ),
    Row(
        ("data.delimiter",), ("data.format",),
        _when(lambda v: v["data"].get("format") not in ("auto", "csv"), "only CSV files have a delimiter"),
    ),
    Row(
        ("data.encoding",), ("data.format",),
        _when(lambda v: v["data"].get("format") in ("parquet", "arrow"), "only text files have an encoding"),
    ),
    Row(
        ("callback.generate_samples.count",), ("callback.generate_samples.prompts",),
        _when(lambda v: v["callback"]["generate_samples"].get("prompts"), "the prompts are given"),
    ),
    Row(
        ("parallel.hang_seconds", "parallel.timeout_seconds"), ("parallel.num_processes",),
        _when(lambda v: v["parallel"].get("num_processes") == 1, "one process waits for no other"),
    ),
)  # fmt: skip
LOOKED_AT = {key for row in ROWS for key in row.keys + row.reads} | set(COMPONENT_KNOBS)


@dataclass(frozen=True)
class Unused:
    """Why a setting has no effect itself, and the settings through which it still has one."""

    reason: str
    only_sets: tuple[str, ...] = ()


def unused_settings(
    values: Values, readers: Mapping[str, list[str]], keys: Iterable[str], wrong: set[str]
) -> dict[str, Unused]:
    """Return those of some keys that have no effect; `readers` are the settings that refer to a key.

    What rests on a `wrong` key is left out: that key's own problem is reported.
    """
    found = {}
    for key in keys:
        reason = _reason(values, key, wrong)
        live = tuple(r for r in readers[key] if _lives(values, r, readers, wrong)) if reason else ()
        if reason and not (live and key in COMPONENT_KNOBS):
            found[key] = Unused(reason, live)
    return found


def _readers(raw: Values) -> dict[str, list[str]]:
    """Return for each key the settings whose interpolations name it."""
    out: dict[str, list[str]] = defaultdict(list)
    for key, _, value in nodes(raw):
        if isinstance(value, str) and "${" in value:
            for name in set(re.findall(r"\w[\w.]*", value)):
                out[name].append(key)
    return out


def _lives(values: Values, key: str, readers: Mapping[str, list[str]], wrong: set[str]) -> bool:
    return not _reason(values, key, wrong) or any(_lives(values, r, readers, wrong) for r in readers[key])


def _reason(values: Values, key: str, wrong: set[str]) -> str | None:
    """Return why a setting does nothing by itself, or None."""
    if key in COMPONENT_KNOBS:
        return _unused(values, key)
    for row in ROWS:
        tops = {k.split(".")[0] for k in (key, *row.reads)}
        if key in row.keys and get(values, key, MISSING) is not MISSING and not tops & wrong and tops <= values.keys():
            return row.why(values)
    return None


def _unused(values: Values, knob: str) -> str:
    """Return why the chosen component does not refer to a knob."""
    group = COMPONENT_KNOBS[knob]
    option = values.get(MIRRORS[group])
    usual = component_of(group, str(option))
    field = next((k for k, v in usual.items() if v == f"${{{knob}}}"), None)
    if field is not None and isinstance(values.get(group), dict) and field in values[group]:
        return f"{group}.{field}={show(values[group][field])} is used instead"
    return f"{group}={option} does not use it"


class Uses:
    """Which settings have an effect at the points of a sweep; a plain run is a sweep of one point."""

    def __init__(self, axes: Mapping[str, tuple[Any, ...]], typed: Callable[[], Iterable[str]], origin: Origin) -> None:
        self.axes = axes
        self.typed = typed
        """Returns the keys that a person has set, at the point composed last."""
        self.origin = origin
        self.points = 0
        self.different: set[tuple[tuple[str, str], ...]] = set()
        """The points without what has no effect there."""
        self.set_at: dict[str, int] = defaultdict(int)
        self.unused_at: dict[str, list[Unused]] = defaultdict(list)
        self.reasons: dict[str, str] = {}

    def look(self, tree: Tree, options: Values, plain: Mapping[str, tuple[Any, ...]]) -> None:
        """Look at all points that have these options composed."""
        if tree.problems:
            return  # interpolations that cannot be resolved, which may go round in circles
        keys, readers = {*self.typed(), *self.axes}, _readers(tree.raw)
        swept = {k: right for k, v in plain.items() if k in LOOKED_AT and (right := _right(k, v, self.origin))}
        for combination in islice(product(*swept.values()), MOST_POINTS - self.points):
            point = dict(zip(swept, combination, strict=True))
            values = _without_wrong_groups(replaced(tree.values, point))
            unused = unused_settings(values, readers, keys, tree.wrong)
            self.points += 1
            for key in keys:
                self.set_at[key] += 1
                if key in unused:
                    self.unused_at[key].append(unused[key])
                    self.reasons.setdefault(key, self._reason_for(key, values, unused[key]))
            dead = {k for k, one in unused.items() if not one.only_sets}
            self.different.add(tuple((k, show(v)) for k, v in (options | point).items() if k not in dead))

    def _reason_for(self, key: str, values: Values, unused: Unused) -> str:
        value = get(values, key)
        place = self.origin(key)
        where = "" if place.startswith(("command line", "config")) else f" ({place})"
        does = f"only sets {', '.join(unused.only_sets)}" if unused.only_sets else "has no effect"
        return f"{key}={show(value)}{where} {does}: {unused.reason}"

    def _everywhere(self, key: str) -> bool:
        return len(self.unused_at[key]) == self.set_at[key] > 0

    def problems(self) -> list[str]:
        """Return a problem for each key that is swept though it has no effect at any point."""
        return [
            f"{self.origin(key)}: `{key}`: all its values train the same model: {self.unused_at[key][0].reason}. "
            f"Take it out of the sweep."
            for key, values in self.axes.items()
            if len(values) > 1 and self._everywhere(key) and not any(i.only_sets for i in self.unused_at[key])
            and self.points < MOST_POINTS
        ]  # fmt: skip

    def notes(self) -> list[str]:
        """Return a note on each setting that has no effect, wherever it is set."""
        return [reason for key, reason in sorted(self.reasons.items()) if self._everywhere(key)]

    def repeats(self) -> list[str]:
        """Return a note if some trials of the sweep repeat others."""
        trials = _count(self.axes)
        same = trials - trials * len(self.different) // max(1, self.points)
        if not same:
            return []
        partly = [k for k in self.axes if self.unused_at[k] and not self._everywhere(k)]
        why = "; ".join(f"{k} has no effect where {self.unused_at[k][0].reason}" for k in partly)
        return [f"{same} of {trials} trials repeat{'s' * (same == 1)} another: {why or 'a value is listed twice'}"]


def _count(axes: Mapping[str, tuple[Any, ...]]) -> int:
    count = 1
    for values in axes.values():
        count *= len(values)
    return count


def _right(key: str, values: tuple[Any, ...], origin: Origin) -> list[Any]:
    return [v for v in values if key not in KNOBS or not check_knob(key, v, origin)]


def _without_wrong_groups(values: Values) -> Values:
    return {k: v for k, v in values.items() if k not in ALL_GROUPS or isinstance(v, dict)}
