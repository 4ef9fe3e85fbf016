"""The manual's spellings of a config group's choice: `optim=adamw_torch` is `optimizer=adamw`.

They are rewritten before composition wherever they stand (command line, JSON file, experiment,
sweep space), so that everything after composition knows one spelling; the manual's key then
mirrors the choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sftx.errors import ConfigError

MIRRORS = {"mode": "train_mode", "optimizer": "optim", "scheduler": "lr_scheduler_type"}
"""Group -> the manual's key that mirrors its choice; set when the group's file is loaded."""

GROUP_OF_KEY = {mirror: group for group, mirror in MIRRORS.items()} | {"report_to": "tracker"}

OTHER_NAMES: dict[str, dict[str, str]] = {
    "optimizer": {
        "adamw_torch": "adamw",
        "adamw_torch_fused": "adamw",
        "adamw_hf": "adamw",
        "adamw_bnb_8bit": "adamw_8bit",
        "paged_adamw": "paged_adamw_32bit",
        "lion_32bit": "lion",
    },
    "scheduler": {
        "fixed": "constant",
        "step_decay": "step",
        "exponential_decay": "exponential",
        "cosine_annealing": "cosine",
        "inverse_square_root": "inverse_sqrt",
        "wsd": "warmup_stable_decay",
        "reduce_on_plateau": "reduce_lr_on_plateau",
    },
    "tracker": {"all": "[tensorboard,wandb]", "both": "[tensorboard,wandb]"},
}

OBSOLETE = {"adamw_hf": "optim=adamw_hf no longer exists in transformers: torch's AdamW is used"}
PRECISION_KEYS = ("fp16", "bf16")


@dataclass
class Choices:
    """What one source (a command line, a file) chooses, after rewriting."""

    groups: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def option_for(group: str, value: Any) -> Any:
    """Return the group's option for a value in any spelling; lists are rewritten item by item."""
    if isinstance(value, list | tuple):
        return [option_for(group, v) for v in value]
    return OTHER_NAMES.get(group, {}).get(str(value), value)


def rewrite(values: Mapping[str, Any], where: str, groups: frozenset[str]) -> Choices:
    """Split one source's keys into group choices and plain values, in one spelling.

    `values` maps a key to its value or, in a sweep, to a `Sweep` of values.
    """
    out = Choices()
    typed: dict[str, tuple[str, Any]] = {}
    for key, value in values.items():
        group = GROUP_OF_KEY.get(key, key if key in groups and not isinstance(value, Mapping) else None)
        if group is None or value is None:
            if key not in PRECISION_KEYS:
                out.values[key] = value
            continue
        out.notes += [OBSOLETE[str(v)] for v in each(value) if str(v) in OBSOLETE]
        option = over(value, lambda v, g=group: option_for(g, v))
        if group in typed and typed[group][1] != option:
            first, chosen = typed[group]
            out.problems.append(
                f"{where}: `{first}` chooses {group}={show(chosen)} and `{key}` chooses {group}={show(option)}. "
                f"They are two spellings of one choice: keep one."
            )
        typed[group] = (key, option)
        out.groups[group] = option
    _rewrite_precision(values, where, out)
    if values.get("save_strategy") is False:  # YAML reads an unquoted `no` as false
        out.values["save_strategy"] = "no"
    return out


def _rewrite_precision(values: Mapping[str, Any], where: str, out: Choices) -> None:
    """Turn `fp16` and `bf16` into a choice of `precision`."""
    given = {k: values[k] for k in PRECISION_KEYS if k in values}
    bad = {k: v for k, v in given.items() if any(not isinstance(b, bool) for b in each(v))}
    for key, value in bad.items():
        out.problems.append(f"{where}: `{key}`: found {show(value)}, wanted true or false.")
    if not given or bad:
        return
    if given.get("fp16") is True and given.get("bf16") is True:
        out.problems.append(
            f"{where}: `fp16` and `bf16` are both true: keep the one that the GPU has (bf16: Ampere on)."
        )
        return
    if given.get("bf16") is True:
        option: Any = "bf16"
        if "fp16" not in given:
            out.notes.append("bf16=true replaces the default fp16=true")
    elif "fp16" in given:
        option = over(given["fp16"], lambda on: "fp16" if on else "fp32")
    elif isinstance(given["bf16"], Sweep):
        option = over(given["bf16"], lambda on: "bf16" if on else "fp32")
    else:
        return  # bf16=false alone says what is already so
    if out.groups.get("precision", option) != option:
        chosen = show(out.groups["precision"])
        out.problems.append(f"{where}: `precision={chosen}` and `{', '.join(given)}` choose differently: keep one.")
    out.groups["precision"] = option


@dataclass(frozen=True)
class Sweep:
    """Several values of one key, in the order they were typed."""

    values: tuple[Any, ...]


def each(value: Any) -> tuple[Any, ...]:
    """Return the values of a sweep, or the one value."""
    return value.values if isinstance(value, Sweep) else (value,)


def over(value: Any, change: Any) -> Any:
    """Apply `change` to the value, or to each value of a sweep."""
    return Sweep(tuple(change(v) for v in value.values)) if isinstance(value, Sweep) else change(value)


def show(value: Any) -> str:
    """Write a value as a user types it."""
    if isinstance(value, Sweep):
        return ",".join(show(v) for v in value.values)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ",".join(show(v) for v in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{k}:{show(v)}" for k, v in value.items()) + "}"
    return str(value)


def raise_if(problems: list[str]) -> None:
    """Raise one ConfigError for all the problems, if there are any."""
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
