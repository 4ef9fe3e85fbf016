"""Check a composed configuration against the schema and its components' signatures; edits nothing."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sftx import train_command
from sftx.config.checks.interface import DOCS, left_from_option, name_own_components, not_a_component
from sftx.config.checks.rules import broken_rules
from sftx.config.checks.signature import TargetNotFound, read_signature
from sftx.config.checks.types import describe, is_text, matches, options_of
from sftx.config.help.other_trainers import counterpart
from sftx.config.options import option_keys, options
from sftx.config.schema import GROUPS, KNOBS, LIST_GROUPS, OVERLAYS, TYPES, TrainConfig
from sftx.config.trees import get
from sftx.config.untrusted.allowlist import pattern_problem, refusal, unlisted
from sftx.config.values import Origin, found, show
from sftx.errors import ConfigError, did_you_mean, nearest

MISSING = "???"
RUNTIME = "${hydra:"
"""Hydra's own values, known only when the job starts."""


class Tree:
    """A composed configuration as plain values, with what could not be resolved."""

    def __init__(self, cfg: DictConfig, origin: Origin) -> None:
        raw = OmegaConf.to_container(cfg, resolve=False)
        assert isinstance(raw, dict)
        self.raw: dict[str, Any] = {str(k): v for k, v in raw.items() if v != MISSING}
        self.problems: list[str] = []
        self.unresolved: set[str] = set()
        self.wrong: set[str] = set()
        """Top-level keys that have a problem; known once the tree is checked."""
        failed: dict[str, str] = {}
        self.values = {k: self._resolve(cfg, k, v, failed) for k, v in self.raw.items()}
        causes = {k: why for k, why in failed.items() if not self._rests_on_another(k, failed)}
        for key, why in (causes or failed).items():
            self.problems.append(f"{origin(key)}: `{key}`: {show(get(self.raw, key))} cannot be resolved: {why}.")
        self.unresolved |= set(failed)

    @property
    def allow(self) -> tuple[str, ...]:
        """The targets that were allowed beside sftx's own; of a wrong list, none."""
        patterns = self.raw.get("allow_targets")
        return () if not isinstance(patterns, list) or any(map(pattern_problem, patterns)) else tuple(patterns)

    def _resolve(self, cfg: DictConfig, key: str, raw: Any, failed: dict[str, str]) -> Any:
        if isinstance(raw, dict):
            return {str(k): self._resolve(cfg, f"{key}.{k}", v, failed) for k, v in raw.items()}
        if "${" not in str(raw):
            return raw
        try:
            value = OmegaConf.select(cfg, key, throw_on_missing=True)
            return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        except OmegaConfBaseException as error:
            if RUNTIME in str(raw):
                self.unresolved.add(key)
            else:
                failed[key] = str(error).split("\n")[0].rstrip(".")
            return None

    def _rests_on_another(self, key: str, failed: dict[str, str]) -> bool:
        """True when an interpolation fails only because of a key that fails itself, or is missing below."""
        return any(target in failed and target != key for target in self.targets(key))

    def targets(self, key: str) -> list[str]:
        """Return the keys that a value's interpolations name."""
        return re.findall(r"\$\{([\w.]+)\}", str(get(self.raw, key)))


def check_tree(cfg: DictConfig, origin: Origin = lambda _: "config") -> list[str]:
    """Return every problem of a composed configuration, each with its key, value, allowed values and cure."""
    return check_resolved(Tree(cfg, origin), origin)


def check_resolved(tree: Tree, origin: Origin, *, rules: bool = True) -> list[str]:
    """Return every problem of a configuration whose interpolations are resolved, with or without the rules."""
    problems = list(tree.problems)
    problems += unlisted(tree.raw, tree.allow, origin) or unlisted(tree.values, tree.allow, origin)
    wrong = {k.split(".")[0] for k in tree.unresolved}
    for key in sorted(tree.values, key=lambda k: bool(tree.targets(k))):  # what names another key comes after it
        if key in tree.unresolved or key in GROUPS or wrong.intersection(tree.targets(key)):
            continue
        if key in KNOBS:
            found_here = check_knob(key, tree.values[key], origin)
            wrong |= {key} if found_here else set()
            problems += found_here
        else:
            problems.append(_unknown_key(key, tree.values[key], origin))
    for key in [k for k in tree.values if k in GROUPS]:
        found_here = check_group(tree, key, wrong, origin)
        wrong |= {key} if found_here else set()
        problems += found_here
    for name in [f.name for f in fields(TrainConfig) if f.name not in tree.values]:
        problems.append(f"{origin(name)}: `{name}` has no value.")
    tree.wrong = wrong
    broken = broken_rules(tree.values, wrong) if rules else ()
    problems += [f"{origin(rule.keys[0])}: {text}" for rule, text in broken]
    return list(dict.fromkeys(problems))


def freeze(cfg: DictConfig) -> TrainConfig:
    """Return the composed configuration as a frozen `TrainConfig`, checked once more.

    Raises:
        ConfigError: every problem found.
    """
    problems = check_tree(cfg)
    if problems:
        raise ConfigError(problems)
    tree = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(tree, dict)
    name_own_components(tree)
    return config_from(tree)


def config_from(tree: dict[Any, Any]) -> TrainConfig:
    """Build a `TrainConfig` from plain values, as `config.yaml` of a run folder holds them."""
    values = {f.name: tree[f.name] for f in fields(TrainConfig)}
    for name, kind in get_type_hints(TrainConfig).items():
        if kind is float and isinstance(values[name], int):
            values[name] = float(values[name])
    return TrainConfig(**values)


def check_knob(key: str, value: Any, origin: Origin) -> list[str]:
    """Check one of the schema's keys."""
    if value == "":
        return [f"{origin(key)}: `{key}`: expected {describe(TYPES[key])}, got an empty value."]
    return _check_value(key, value, TYPES[key], origin)


def _check_value(key: str, value: Any, kind: Any, origin: Origin) -> list[str]:
    if matches(value, kind):
        return []
    return [f"{origin(key)}: `{key}`: expected {describe(kind)}, got {found(value)}.{_hint(value, kind)}"]


def _hint(value: Any, kind: Any) -> str:
    choices = options_of(kind)
    if choices:
        return did_you_mean(str(value), choices)
    if is_text(kind) and isinstance(value, bool | int | float):
        return " Put it in quotes."
    return ""


def _unknown_key(key: str, value: Any, origin: Origin) -> str:
    head = f"{origin(key)}: unknown key `{key}` (value {show(value)})."
    if row := counterpart(key):
        return f"{head} {row.answer()}"
    hint = did_you_mean(key, [*KNOBS, *GROUPS, *OVERLAYS])
    deeper = [f"{g}.{key}" for g in GROUPS if key in _keys_of_options(g)]
    if deeper:
        hint = f" Did you mean `{deeper[0]}`?"
    return f"{head}{hint} All keys: {train_command()} --help"


def _elsewhere(group: str, name: str) -> str:
    """Return which other options of a group have a key of about this name, or what it is called elsewhere in sftx."""
    keys = _keys_of_options(group) if group in GROUPS else {}
    row = counterpart(name)
    if row and name not in keys:
        return f" {row.answer()}"
    near = nearest(name, keys)
    if near is None:
        return ""
    return f" Did you mean `{near}`? {', '.join(f'{group}={option}' for option in keys[near])} has it."


def _keys_of_options(group: str) -> dict[str, list[str]]:
    """Return the keys that the options of a group have, each with the options that have it."""
    out: dict[str, list[str]] = {}
    for option in options(group):
        for key in option_keys(group, option):
            out.setdefault(key, []).append(option)
    return out


def check_group(tree: Tree, key: str, wrong: set[str], origin: Origin) -> list[str]:
    """Check what a config group was composed to."""
    value = tree.values[key]
    if not isinstance(value, dict):
        return [f"{origin(key)}: `{key}`: expected one of {', '.join(options(key))}, got {found(value)}."]
    if key not in LIST_GROUPS:
        return check_component(key, tree, wrong, origin)
    problems = []
    for name, node in value.items():
        path = f"{key}.{name}"
        if isinstance(node, dict) and "_target_" not in node:
            known = options(key)
            cure = f" Choose it too: {key}=[{name}]." if name in known else f" Allowed: {', '.join(known)}."
            hint = "" if name in known else did_you_mean(name, known)
            problems.append(f"{origin(path)}: `{path}` is not among the chosen.{hint}{cure}")
        else:
            problems += check_component(path, tree, wrong, origin)
    return problems


def check_component(key: str, tree: Tree, wrong: set[str], origin: Origin) -> list[str]:
    """Check a node that Hydra will instantiate against the signature of its class.

    A value taken from a knob in `wrong` is that knob's problem and is not reported again.
    """
    node = get(tree.values, key)
    if not isinstance(node, dict):
        return [f"{origin(key)}: `{key}`: expected a component with `_target_`, got {found(node)}."]
    target = node.get("_target_")
    if not isinstance(target, str):
        return [f"{origin(key)}: `{key}._target_` names no class."]
    if refusal(target, tree.allow):
        return []  # reported by `unlisted`
    try:
        signature = read_signature(target)
    except TargetNotFound as error:
        return [f"{origin(f'{key}._target_')}: `{key}._target_={target}`: {error}"]
    reason = not_a_component(key, target)
    if reason:
        return [f"{origin(f'{key}._target_')}: `{key}._target_={target}`: {reason}"]
    if signature is None:
        return []
    left = left_from_option(key, target, tree.values)
    unused = [n for n in left if n in node and n not in signature.arguments and not signature.open]
    problems = _left_over(key, target, unused, left, origin)
    for name, value in node.items():
        path = f"{key}.{name}"
        argument = signature.arguments.get(name)
        if name in HYDRA_KEYS or name in unused or path in tree.unresolved or wrong.intersection(tree.targets(path)):
            continue
        if argument is None and not signature.open:
            renamed = f" It is now `{RENAMED[path]}`." if path in RENAMED else ""
            problems.append(
                f"{origin(path)}: unknown key `{path}` (value {show(value)})."
                f"{renamed or did_you_mean(name, signature.arguments) or _elsewhere(key, name)}\n"
                f"`{key}` takes: {', '.join(signature.arguments) or 'nothing'}."
            )
        elif isinstance(value, dict) and "_target_" in value:
            problems += check_component(path, tree, wrong, origin)
        elif argument and argument.kind is not None:
            problems += _check_value(path, value, argument.kind, origin)
    for name, argument in signature.arguments.items():
        if argument.required and name not in node and "_partial_" not in node:
            problems.append(f"{origin(key)}: `{key}.{name}` has no value.")
    return problems


def _left_over(key: str, target: str, names: list[str], options: dict[str, str], origin: Origin) -> list[str]:
    """Report the keys of an option whose class was replaced by one that does not take them."""
    if not names:
        return []
    keys, out = ", ".join(f"`{key}.{n}`" for n in names), " ".join(f"~{key}.{n}" for n in names)
    option = f"{key.partition('.')[0]}={options[names[0]]}"
    return [
        f"{origin(f'{key}._target_')}: {keys} of {option}: {target} does not take this. "
        f"Type {out}, or write an option file for it ({DOCS})."
    ]


RENAMED = {"data.shape": "data.schema", "data.learn": "data.train_on"}
HYDRA_KEYS = frozenset({"_target_", "_partial_", "_recursive_", "_convert_", "_args_"})
