"""The manual's names for a config group's choice: `optim=adamw_torch` is `optimizer=adamw`.

They are translated on the command line and in the JSON argument file, before composition. In YAML they are an error
that gives the line to write. The composed configuration holds them as mirrors of the choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from omegaconf import DictConfig, open_dict

from sftx.config.schema import GROUPS, LIST_GROUPS, OVERLAYS
from sftx.config.values import Deleted, Origin, Sweep, each, found, over, show

MIRRORS = {"mode": "train_mode", "optimizer": "optim", "scheduler": "lr_scheduler_type"}
"""Group -> the manual's key that names its choice."""
HALVES = ("fp16", "bf16")
ALIASES = {mirror: group for group, mirror in MIRRORS.items()}
ALIASES |= {"report_to": "tracker", "fp16": "precision", "bf16": "precision"}
"""The manual's key -> the group that it chooses an option of."""

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
"""Option of `precision` -> the values of the manual's two keys."""


@dataclass(frozen=True)
class PrecisionExcept:
    """The precision after `fp16=false` alone: what the configuration chooses, but fp32 if that is the one ruled out."""

    ruled_out: str

    def resolve(self, chosen: str) -> str:
        """Return the precision, given the one that the configuration chooses."""
        return "fp32" if chosen == self.ruled_out else chosen


def resolve_precision(precision: Any, chosen: str) -> Any:
    """Resolve every `PrecisionExcept` of a choice, or of a sweep of choices."""
    return over(precision, lambda v: v.resolve(chosen) if isinstance(v, PrecisionExcept) else v)


@dataclass
class Choices:
    """What one source (the command line, the JSON file) chooses, its aliases translated."""

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
    return ALIASES.get(key, key)


def translate(values: Mapping[str, Any], origin: Origin, groups: frozenset[str]) -> Choices:
    """Split one source's keys into group choices and plain values, and translate aliases.

    `values` maps a key to its value or, in a sweep, to a `Sweep` of values; `origin` names a key's place.
    """
    out = Choices()
    first: dict[str, str] = {}
    for key, value in values.items():
        group = ALIASES.get(key, key if key in groups and not isinstance(value, Mapping) else None)
        if key in HALVES:
            continue
        if group is None:
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
    _translate_halves(values, origin, out)
    return out


def _translate_halves(values: Mapping[str, Any], origin: Origin, out: Choices) -> None:
    """Turn `fp16` and `bf16` into a choice of `precision`."""
    given = {k: values[k] for k in HALVES if k in values}
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
        option: Any = next(o for o, halves in PRECISIONS.items() if halves == given)
    else:
        [(key, value)] = given.items()
        option = over(value, lambda on: key if on else PrecisionExcept(key))
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


def refuse_in_yaml(body: dict[str, Any], group: str, place: Origin) -> list[str]:
    """Return a problem with the line to write for each alias in a file of a group, and take them out of the body."""
    given = {key: body.pop(key) for key in ALIASES if key in body}
    problems = []
    for key, value in given.items():
        chosen = plain_name(key)
        if key in HALVES:
            other = next(half for half in HALVES if half != key)
            options: Any = {True: key, False: other if given.get(other) is True else "fp32"}
            option = over(value, options.get)
        else:
            option = over(value, partial(option_for, chosen))
        line = f"{chosen}: {show(option)}"
        if group in GROUPS:
            cure = f"an option of `{group}` cannot choose one of `{chosen}`; write `{line}` in an experiment"
        else:
            cure = f"write `{line}`" if group in OVERLAYS else f"write `- {line}` in the defaults list"
        problems.append(f"{place(key)}: `{key}` is for the command line and args_file: {cure}.")
    return problems


def set_mirrors(cfg: DictConfig, choices: Mapping[str, Any]) -> None:
    """Let the manual's keys of a composed configuration name what its groups chose."""
    precision, tracker = cfg.get("precision"), cfg.get("tracker")
    dtype = precision.get("dtype") if isinstance(precision, DictConfig) else None
    with open_dict(cfg):
        for group, key in MIRRORS.items():
            cfg[key] = choices[group]
        cfg.report_to = list(tracker) if isinstance(tracker, DictConfig) else []
        cfg.fp16, cfg.bf16 = dtype == "float16", dtype == "bfloat16"
