"""Check a composed configuration against the schema and its components' signatures; edits nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sftx.config.schema import GROUPS, KNOBS, LIST_GROUPS, OVERLAYS, TrainConfig
from sftx.config.signature import TargetNotFound, public_names, read_signature
from sftx.config.spellings import show
from sftx.config.types import describe, matches, options_of
from sftx.errors import ConfigError, did_you_mean

Origin = Callable[[str], str]
"""Names where a key got its value, for a message."""


def check_tree(cfg: DictConfig, origin: Origin = lambda _: "config") -> list[str]:
    """Return every problem of a composed configuration, each with its key, value, allowed values and cure."""
    problems: list[str] = []
    tree = _resolved(cfg, origin, problems)
    for key, value in tree.items():
        if key in KNOBS:
            problems += _check_knob(key, value, origin)
        elif key in GROUPS:
            problems += _check_group(key, value, origin)
        else:
            known = [*KNOBS, *GROUPS, *OVERLAYS]
            problems.append(
                f"{origin(key)}: unknown key `{key}` (value {show(value)}).{did_you_mean(key, known)} "
                f"All keys: python train.py --help"
            )
    missing = [f.name for f in fields(TrainConfig) if f.name not in tree]
    problems += [f"{origin(k)}: `{k}` has no value." for k in missing]
    if not problems:
        problems += [f"{origin(key)}: {text}" for key, text in _impossible(tree)]
    return problems


def freeze(cfg: DictConfig) -> TrainConfig:
    """Return the composed configuration as a frozen `TrainConfig`, checked once more.

    Errors:
        ConfigError: every problem found.
    """
    problems = check_tree(cfg)
    if problems:
        raise ConfigError(problems)
    tree = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(tree, dict)
    return config_from(tree)


def config_from(tree: dict[Any, Any]) -> TrainConfig:
    """Build a `TrainConfig` from plain values, as `config.yaml` of a run folder holds them."""
    values = {f.name: tree[f.name] for f in fields(TrainConfig)}
    for f in fields(TrainConfig):
        if f.type == "float" and isinstance(values[f.name], int):
            values[f.name] = float(values[f.name])
    return TrainConfig(**values)


def _resolved(cfg: DictConfig, origin: Origin, problems: list[str]) -> dict[str, Any]:
    """Resolve interpolations key by key, so that one that fails does not hide the others."""
    raw = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(raw, dict)
    tree: dict[str, Any] = {}
    for key in map(str, raw):
        if OmegaConf.is_missing(cfg, key):
            continue
        try:
            value = cfg[key]
            tree[key] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        except OmegaConfBaseException as error:
            reason = str(error).split("\n")[0]
            problems.append(f"{origin(key)}: `{key}`: {show(raw[key])} cannot be resolved: {reason}.")
            tree[key] = None
    return tree


def _check_knob(key: str, value: Any, origin: Origin) -> list[str]:
    annotation, meta = str(KNOBS[key].type), KNOBS[key].metadata
    if not matches(value, annotation):
        choices = options_of(annotation)
        hint = did_you_mean(str(value), choices) if choices else ""
        return [f"{origin(key)}: `{key}`: found {_found(value)}, wanted {describe(annotation)}.{hint}"]
    if isinstance(value, int | float) and not isinstance(value, bool):
        for bound, broken, word in (
            (meta["at_least"], lambda b: value < b, "at least"),
            (meta["above"], lambda b: value <= b, "above"),
            (meta["at_most"], lambda b: value > b, "at most"),
        ):
            if bound is not None and broken(bound):
                return [
                    f"{origin(key)}: `{key}`: found {show(value)}, wanted {describe(annotation)}, {word} {bound:g}."
                ]
    return []


def _found(value: Any) -> str:
    if isinstance(value, str):
        return f"the text {value!r}"
    return (
        f"a {'list' if isinstance(value, list) else 'mapping'} {show(value)}"
        if isinstance(value, list | dict)
        else show(value)
    )


def _check_group(key: str, value: Any, origin: Origin) -> list[str]:
    if not isinstance(value, dict):
        return [f"{origin(key)}: `{key}`: found {_found(value)}, wanted one of the group's options."]
    if key not in LIST_GROUPS:
        return check_component(key, value, origin)
    return [p for name, node in value.items() for p in check_component(f"{key}.{name}", node, origin)]


def check_component(key: str, node: Any, origin: Origin) -> list[str]:
    """Check a node that Hydra will instantiate against its class's source, without importing it."""
    if not isinstance(node, dict):
        return [f"{origin(key)}: `{key}`: found {_found(node)}, wanted a component with `_target_`."]
    target = node.get("_target_")
    if not isinstance(target, str):
        return [f"{origin(key)}: `{key}._target_` names no class."]
    try:
        signature = read_signature(target)
    except TargetNotFound as error:
        module, _, name = target.rpartition(".")
        hint = did_you_mean(name, public_names(module))
        return [f"{origin(f'{key}._target_')}: `{key}._target_={target}`: {error}.{hint}"]
    if signature is None:
        return []
    problems = []
    for name, value in node.items():
        argument = signature.arguments.get(name)
        path = f"{key}.{name}"
        if name == "_target_":
            continue
        if argument is None and not signature.open:
            hint = did_you_mean(name, signature.arguments)
            problems.append(
                f"{origin(path)}: unknown key `{path}` (value {show(value)}).{hint}\n"
                f"`{key}` takes: {', '.join(signature.arguments) or 'nothing'}."
            )
        elif isinstance(value, dict) and "_target_" in value:
            problems += check_component(path, value, origin)
        elif argument and argument.annotation and not matches(value, argument.annotation):
            problems.append(f"{origin(path)}: `{path}`: found {_found(value)}, wanted {describe(argument.annotation)}.")
    for name, argument in signature.arguments.items():
        if argument.required and name not in node:
            problems.append(f"{origin(key)}: `{key}.{name}` has no value.")
    return problems


def _impossible(tree: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (key, problem) for settings that are each right but cannot go together."""
    evaluates = tree["eval_ratio"] > 0 or tree["eval_file_name"] is not None
    if tree["fp16"] and tree["bf16"]:
        yield "bf16", "`fp16` and `bf16` are both true: keep one."
    if tree["keep_best"] and not evaluates:
        yield "keep_best", "`keep_best=true` needs an evaluation: set eval_ratio above 0 or eval_file_name."
    if tree["keep_best"] and tree["save_strategy"] == "no":
        yield "keep_best", "`keep_best=true` needs checkpoints: set save_strategy=steps or epoch."
    if "early_stopping" in tree["callback"] and not evaluates:
        yield "callback.early_stopping", "early stopping needs an evaluation: set eval_ratio above 0 or eval_file_name."
    if tree["lr_scheduler_type"] == "reduce_lr_on_plateau" and not evaluates:
        yield "scheduler", "`reduce_lr_on_plateau` needs an evaluation: set eval_ratio above 0 or eval_file_name."
    if tree["adapter"] is not None and tree["train_mode"] == "full":
        yield "adapter", "`adapter` needs mode=lora or mode=qlora: full mode trains no adapter."
    warmup = tree["warmup_steps"]
    if warmup > 1 and warmup != int(warmup):
        yield "warmup_steps", f"`warmup_steps`: found {warmup}, wanted a whole number of steps, or a share below 1."
    if tree["resume"] not in ("auto", "never") and not Path(tree["resume"]).is_dir():
        yield (
            "resume",
            (
                f"`resume`: found {tree['resume']!r}, wanted auto, never or the folder of a checkpoint."
                f"{did_you_mean(tree['resume'], ['auto', 'never'])}"
            ),
        )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and str(tree["parallel"].get("_target_", "")).endswith(".Single"):
        yield (
            "parallel",
            (f"{world} processes were started, but parallel=single trains alone in each: add parallel=ddp."),
        )
