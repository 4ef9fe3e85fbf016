"""Rewrite overlays (experiment, sweep, debug) for Hydra, collecting what is wrong with them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from sftx.config.checks import hydra_keys
from sftx.config.checks.types import matches
from sftx.config.composition.aliases import ALIASES, refuse_in_yaml
from sftx.config.composition.grammar import brings_keys, grammar, read_override
from sftx.config.composition.yaml_file import YamlFile, shown
from sftx.config.options import ALL_GROUPS, unknown_option
from sftx.config.schema import GROUPS, LIST_GROUPS, OVERLAYS, TYPES
from sftx.config.trees import leaves
from sftx.config.values import Sweep, each, show
from sftx.errors import did_you_mean


@dataclass
class Reading:
    """What was read from the files of one composition."""

    typed: frozenset[str] = frozenset()
    """Keys that the command line sets: a sweep file's values of these give way."""
    loaded: list[tuple[int, YamlFile, str]] = field(default_factory=list)
    """Each file with its layer (a higher one overrides) and the package its keys went to ('' is the top)."""
    chosen: set[str] = field(default_factory=set)
    """Groups that an overlay chose."""
    places: dict[str, str] = field(default_factory=dict)
    """Group or swept key -> the place of the choice in an overlay."""
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def place_of(self, key: str) -> str | None:
        """Return `file:line` of what sets a dotted key of the composed config: the last file that does."""
        for _, file, package in sorted(self.loaded, key=lambda entry: entry[0])[::-1]:
            inner = key.removeprefix(f"{package}.") if package else key
            if (not package or inner != key) and (number := file.line_of(inner)):
                return f"{shown(file.path)}:{number}"
        return None


def overlay_body(file: YamlFile, group: str, reading: Reading) -> dict[str, Any]:
    """Return the body of an experiment, a sweep or a debug preset: choices in its defaults list, the rest as values."""
    body = _nested({k: v for k, v in file.body.items() if k not in ("defaults", "hydra")}, file, reading)
    values, chosen = _split(body)
    entries, listed = _defaults(file, group, reading)
    for name, option in chosen.items():
        if name in listed and listed[name] != option:
            reading.problems.append(
                f"{file.place(name)}: the defaults list chooses {name}={show(listed[name])}, this key "
                f"chooses {name}={show(option)}: keep one."
            )
        elif name not in listed and _known(name, option, file.place(name), reading):
            reading.places[name] = file.place(name)
            entries.append({f"override /{name}": option})
    reading.chosen |= {*chosen, *listed}
    out = {"defaults": entries} if entries else {}
    hydra = _hydra_body(file, group, reading)
    return out | values | ({"hydra": hydra} if hydra else {})


def _split(body: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a body into values and choices of options."""
    chosen = {k: v for k, v in body.items() if k in GROUPS and not isinstance(v, dict)}
    chosen |= {k: [] for k, v in chosen.items() if k in LIST_GROUPS and v is None}
    values = {k: v for k, v in body.items() if k not in chosen}
    return values, chosen


def _nested(body: dict[str, Any], file: YamlFile, reading: Reading) -> dict[str, Any]:
    """Turn `scheduler.power: 2` into the nested form, as on the command line."""
    out: dict[str, Any] = {}
    for key, value in body.items():
        if key in OVERLAYS:
            reading.problems.append(
                f"{file.place(key)}: `{key}` is chosen on the command line; to build on another file of the same "
                f"folder, name it in the defaults list: `- {show(value)}`."
            )
            continue
        node, *rest = key.split(".")
        if not rest:
            out[key] = {**out[key], **value} if isinstance(value, dict) and isinstance(out.get(key), dict) else value
            continue
        below = out.setdefault(node, {})
        for part in rest[:-1]:
            below = below.setdefault(part, {})
        below[rest[-1]] = value
    if out.get("save_strategy") is False:  # YAML reads an unquoted `no` as false
        out["save_strategy"] = "no"
    return out


def _defaults(file: YamlFile, group: str, reading: Reading) -> tuple[list[Any], dict[str, Any]]:
    """Return a file's defaults list, its choices written as Hydra has them, and its choices."""
    raw = file.body.get("defaults", [])
    if not isinstance(raw, list):
        reading.problems.append(
            f"{file.place('defaults')}: `defaults`: expected a list such as "
            f"`- override /mode: qlora`, got {show(raw)!r}."
        )
        return [], {}
    entries: list[Any] = []
    listed: dict[str, Any] = {}
    for i, entry in enumerate(raw):
        origin = file.place(f"defaults.{i}")
        if not isinstance(entry, dict):
            if entry != "_self_" and not (file.path.parent / f"{entry}.yaml").is_file():
                reading.problems.append(
                    f"{origin}: `{entry}`: there is no such file beside this one."
                    f"{did_you_mean(str(entry), (p.stem for p in file.path.parent.glob('*.yaml')))}"
                )
                continue
            entries.append(entry)
            continue
        for key, option in entry.items():
            words = re.fullmatch(r"((?:override |optional )*)(/?)([\w/]+)(@\S+)?", str(key))
            name = words[3] if words else str(key)
            if name in ALIASES:
                reading.problems += refuse_in_yaml({name: option}, group, lambda _: file.place(f"defaults.{i}"))  # noqa: B023
            elif words is None or words[4] or (not words[2] and name not in GROUPS):
                entries.append(entry)  # a form of Hydra's own
            elif name.startswith("hydra/") or name in GROUPS:
                if _known(name, option, origin, reading):
                    reading.places[name] = origin
                    listed[name] = option
                    entries.append({f"override /{name}": option})
            else:
                reading.problems.append(f"{origin}: there is no group `{name}`.{did_you_mean(name, GROUPS)}")
    return entries, listed


def _known(group: str, option: Any, origin: str, reading: Reading) -> bool:
    problems = [unknown_option(group, o, origin) for o in (option if isinstance(option, list) else [option])]
    reading.problems += [p for p in problems if p]
    return not any(problems)


def _hydra_body(file: YamlFile, group: str, reading: Reading) -> dict[str, Any]:
    hydra = file.body.get("hydra") or {}
    if not isinstance(hydra, dict):
        reading.problems.append(f"{file.place('hydra')}: `hydra`: expected a mapping, got {show(hydra)!r}.")
        return {}
    reading.problems += hydra_keys.check_body(hydra, lambda key: file.place(f"hydra.{key}"))
    sweeper = hydra.get("sweeper")
    if isinstance(sweeper, dict) and isinstance(sweeper.get("params"), dict):
        sweeper["params"] = _space(sweeper["params"], file, reading)
        if group == "sweep":
            hydra.setdefault("mode", "MULTIRUN")
    return hydra


def _space(params: dict[str, Any], file: YamlFile, reading: Reading) -> dict[str, Any]:
    """Read a search space; values that are no options are taken out and reported."""

    def place(key: str) -> str:
        return file.place(f"hydra.sweeper.params.{key}")

    values: dict[str, Any] = {}
    for key, value in leaves(params):
        if isinstance(value, list) and not _takes_list(key):
            reading.problems.append(
                f"{place(key)}: `{key}`: found {show(value)}, which is one value; "
                f"the values of a sweep are written `{key}: {show(value)[1:-1]}`."
            )
            continue
        typed = read_override(f"{key}={value}", multirun=True) if isinstance(value, str) else None
        if typed is not None and typed.value == Sweep(()):
            reading.problems.append(f"{place(key)}: `{key}`: a sweep over no values at all.")
            continue
        if isinstance(value, str) and typed is None:
            reading.problems.append(f"{place(key)}: `{key}`: {value!r} cannot be read as the values of a sweep.")
            continue
        values[key] = typed.value if typed else value
    reading.problems += refuse_in_yaml(values, "sweep", place)
    out: dict[str, Any] = {}
    for key, value in values.items():
        if key in reading.typed:
            continue
        origin = place(key)
        if key in ALL_GROUPS and not isinstance(value, dict):
            value = known_values(key, value, origin, reading)
            if value is None:
                continue
        out[f"++{key}" if brings_keys(value) else key] = grammar(value)
        reading.places[key] = origin
    return out


def known_values(group: str, value: Any, origin: str, reading: Reading) -> Any:
    """Return a choice, or a sweep of choices, without the options that do not exist, which are reported; or None."""
    kept = tuple(v for v in each(value) if _known(group, v, origin, reading))
    if not isinstance(value, Sweep):
        return kept[0] if kept else None
    if None in kept:
        reading.problems.append(f"{origin}: `{group}`: null cannot be one of several: run it by itself.")
        kept = tuple(v for v in kept if v is not None)
    return Sweep(kept) if kept else None


def _takes_list(key: str) -> bool:
    return key in LIST_GROUPS or "." in key or (key in TYPES and matches([], TYPES[key]))
