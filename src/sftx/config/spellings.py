"""The manual's spellings of a config group's choice: `optim=adamw_torch` is `optimizer=adamw`.

They are rewritten before composition wherever they stand (command line, JSON file, experiment,
sweep space), so that everything after composition knows one spelling; the manual's key then
mirrors the choice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from sftx.config.grammar import Deleted, Sweep
from sftx.config.schema import LIST_GROUPS
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
    "tracker": {"all": "tensorboard,wandb", "both": "tensorboard,wandb"},
}

OBSOLETE = {"adamw_hf": "optim=adamw_hf no longer exists in transformers: torch's AdamW is used"}
PRECISIONS = {
    "fp16": {"fp16": True, "bf16": False},
    "bf16": {"fp16": False, "bf16": True},
    "fp32": {"fp16": False, "bf16": False},
}
"""Option of `precision` -> what the manual's two keys say of it."""

Origin = Callable[[str], str]
"""Names where a key got its value, for a message."""


@dataclass(frozen=True)
class Without:
    """The precision after `fp16=false` alone: what the layers below choose, but fp32 if that is the one ruled out."""

    ruled_out: str

    def over(self, below: str) -> str:
        """Return the precision, given the one chosen below."""
        return "fp32" if below == self.ruled_out else below


@dataclass
class Choices:
    """What one source (a command line, a file) chooses, after rewriting."""

    groups: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def option_for(group: str, value: Any) -> Any:
    """Return the group's option for a value in any spelling; a list-group's value becomes a list of options."""
    if isinstance(value, Deleted):
        return value
    if group in LIST_GROUPS:
        items = value if isinstance(value, list | tuple) else str(value).split(",")
        names = [n for i in items for n in OTHER_NAMES.get(group, {}).get(str(i).strip(), str(i).strip()).split(",")]
        return list(dict.fromkeys(n for n in names if n not in ("", "none", "None")))
    return OTHER_NAMES.get(group, {}).get(value, value) if isinstance(value, str) else value


def plain_name(key: str) -> str:
    """Return the one name of a key: `optimizer` for `optim`, `precision` for `fp16`."""
    return "precision" if key in PRECISIONS else GROUP_OF_KEY.get(key, key)


def rewrite(values: Mapping[str, Any], origin: Origin, groups: frozenset[str]) -> Choices:
    """Split one source's keys into group choices and plain values, in one spelling.

    `values` maps a key to its value or, in a sweep, to a `Sweep` of values; `origin` names a key's place.
    """
    out = Choices()
    first: dict[str, str] = {}
    for key, value in values.items():
        group = GROUP_OF_KEY.get(key, key if key in groups and not isinstance(value, Mapping) else None)
        if group is None:
            if key not in ("fp16", "bf16"):
                out.values[key] = value
            continue
        out.notes += [OBSOLETE[str(v)] for v in each(value) if str(v) in OBSOLETE]
        option = over(value, partial(option_for, group))
        if group in first and out.groups[group] != option:
            out.problems.append(
                f"{origin(key)}: `{first[group]}` chooses {group}={show(out.groups[group])} and `{key}` chooses "
                f"{group}={show(option)}. They are two spellings of one choice: keep one."
            )
            continue
        first[group] = key
        out.groups[group] = option
    _rewrite_precision(values, origin, out)
    if values.get("save_strategy") is False:  # YAML reads an unquoted `no` as false
        out.values["save_strategy"] = "no"
    return out


def _rewrite_precision(values: Mapping[str, Any], origin: Origin, out: Choices) -> None:
    """Turn `fp16` and `bf16` into a choice of `precision`."""
    given = {k: values[k] for k in ("fp16", "bf16") if k in values}
    bad = {k: v for k, v in given.items() if any(not isinstance(b, bool) for b in each(v))}
    for key, value in bad.items():
        wrong = [b for b in each(value) if not isinstance(b, bool)]
        out.problems.append(f"{origin(key)}: `{key}`: expected true or false, got {found(wrong[0])}.")
    if not given or bad:
        return
    if len(given) == 2 and any(isinstance(v, Sweep) for v in given.values()):
        out.problems.append(
            f"{origin('bf16')}: `fp16` and `bf16` in one sweep: sweep precision=fp16,bf16,fp32 instead."
        )
        return
    if given.get("fp16") is True and given.get("bf16") is True:
        out.problems.append(
            f"{origin('bf16')}: `fp16` and `bf16` are both true: keep the one that the GPU has (bf16: Ampere on)."
        )
        return
    if len(given) == 2:
        option: Any = next(o for o, says in PRECISIONS.items() if says == given)
    else:
        [(key, value)] = given.items()
        option = over(value, lambda on: key if on else Without(key))
        if value is True and key == "bf16" and "precision" not in out.groups:
            out.notes.append("bf16=true replaces the default fp16=true")
    chosen = out.groups.get("precision")
    if chosen is None:
        out.groups["precision"] = option
    elif isinstance(chosen, Sweep) or any(PRECISIONS.get(chosen, given)[k] != v for k, v in given.items()):
        out.problems.append(
            f"{origin(next(iter(given)))}: `precision={show(chosen)}` and "
            f"`{', '.join(f'{k}={show(v)}' for k, v in given.items())}` choose differently: keep one."
        )


def each(value: Any) -> tuple[Any, ...]:
    """Return the values of a sweep, or the one value."""
    return value.values if isinstance(value, Sweep) else (value,)


def over(value: Any, change: Callable[[Any], Any]) -> Any:
    """Apply `change` to the value, or to each value of a sweep."""
    return Sweep(tuple(change(v) for v in value.values)) if isinstance(value, Sweep) else change(value)


def settle(precision: Any, below: str) -> Any:
    """Decide every `Without` of a choice of precision, or of a sweep of them, given the one chosen below."""
    return over(precision, lambda v: v.over(below) if isinstance(v, Without) else v)


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


def found(value: Any) -> str:
    """Write a value for `expected ..., got ...`; a string stands in quotes."""
    if value == "":
        return "an empty value"
    return repr(value) if isinstance(value, str) else show(value)


def raise_if(problems: list[str]) -> None:
    """Raise one ConfigError for all the problems, if there are any."""
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
