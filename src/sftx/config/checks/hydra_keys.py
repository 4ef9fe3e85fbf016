"""Check `hydra.*` settings against Hydra's own schema, so that they are reported with all the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any

from hydra.conf import HydraConf
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sftx import train_command
from sftx.config.trees import leaves, remove
from sftx.config.values import found
from sftx.errors import did_you_mean

OPEN = ("job_logging", "hydra_logging", "launcher", "sweeper")
"""Nodes that Hydra's schema leaves open."""


@cache
def _schema() -> DictConfig:
    return OmegaConf.structured(HydraConf)


def check_key(key: str, value: Any, origin: str) -> str | None:
    """Return what is wrong with one setting, `sweep.dir` for `hydra.sweep.dir`, or None."""
    if key == "searchpath":
        return f"{origin}: `hydra.searchpath`: folders of your own are given by --config-dir FOLDER."
    if key.partition(".")[0] in ("overrides", "runtime"):
        return f"{origin}: `hydra.{key}`: Hydra fills this in itself: take it out."
    node: Any = HydraConf
    done = "hydra"
    for part in key.split("."):
        if not is_dataclass(node):
            break  # an open mapping, or the launcher's and the sweeper's own business
        known = {f.name: f for f in fields(node)}
        if part not in known:
            return (
                f"{origin}: unknown key `{done}.{part}`.{did_you_mean(part, known)} "
                f"All of Hydra's keys: {train_command()} --cfg hydra"
            )
        node, done = known[part].default_factory, f"{done}.{part}"
    if key.partition(".")[0] in OPEN:
        return None
    try:
        OmegaConf.update(_schema(), key, value, merge=True)
    except OmegaConfBaseException as error:
        reason = str(error).split("\n")[0].rstrip(".")
        return f"{origin}: `hydra.{key}`: cannot be {found(value)}: {reason}."
    return None


def check_body(body: dict[str, Any], place: Callable[[str], str]) -> list[str]:
    """Return what is wrong with a file's `hydra:` node, and take it out of the node."""
    problems = []
    for key, value in list(leaves(body)):
        problem = check_key(key, value, place(key))
        if problem:
            problems.append(problem)
            remove(body, key)
    return problems
