"""Which options each config group has: the files of `conf/`, of `--config-dir` folders, and Hydra's own."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore

from sftx import PROJECT_ROOT
from sftx.config.composition.aliases import OTHER_NAMES
from sftx.config.composition.yaml_file import YamlFile, read_yaml
from sftx.config.schema import GROUPS, OVERLAYS
from sftx.config.values import show
from sftx.errors import did_you_mean

ALL_GROUPS = frozenset(GROUPS) | frozenset(OVERLAYS)
CONF = PROJECT_ROOT / "conf"
PLUGINS = {
    "hydra/launcher": {
        "joblib": "joblib",
        "submitit_local": "submitit",
        "submitit_slurm": "submitit",
        "ray": None,
        "rq": None,
    },
    "hydra/sweeper": {"optuna": "optuna", "ax": None, "nevergrad": None},
}
"""Options that Hydra's plugins bring: the plugin's name, or None for those that the allowlist of targets refuses."""
user_folders: list[Path] = []
"""Folders given by `--config-dir`, searched before `conf/`."""


def folder_of(root: Path, group: str) -> Path:
    """Return the folder of a group's files; sftx's own sweeps are at the top level of the checkout."""
    return PROJECT_ROOT / "sweeps" if root == CONF and group == "sweep" else root / group


def options(group: str) -> list[str]:
    """Return the options of a config group, sorted; one in a subfolder is `folder/name`."""
    if group.startswith("hydra/"):
        return _hydra_options(group)
    folders = [folder_of(root, group) for root in (*user_folders, CONF)]
    return sorted({p.relative_to(f).with_suffix("").as_posix() for f in folders for p in f.rglob("*.yaml")})


def _hydra_options(group: str) -> list[str]:
    node: Any = ConfigStore.instance().repo
    for part in group.split("/"):
        node = node.get(part, {}) if isinstance(node, dict) else {}
    packaged = files("hydra.conf").joinpath(group)
    names = [p.name for p in packaged.iterdir()] if packaged.is_dir() else []
    own = [p.name for root in (*user_folders, CONF) for p in (root / group).glob("*.yaml")]
    return sorted({n.removesuffix(".yaml") for n in (*node, *names, *own) if n.endswith(".yaml")})


def file_of(group: str, option: str) -> YamlFile:
    """Return an option's file: the first of its name in the folders searched."""
    paths = [folder_of(root, group) / f"{option}.yaml" for root in (*user_folders, CONF)]
    return read_yaml(next((p for p in paths if p.is_file()), paths[-1]))


def component_of(group: str, option: str) -> dict[str, Any]:
    """Return the component that an option's file holds, wherever its package puts it."""
    body = file_of(group, option).body
    node = body if "_target_" in body else body.get(group, {})
    for below in body.get("defaults", ()):  # an option that differs little from another of its group
        if isinstance(below, str) and below != "_self_":
            node = component_of(group, below) | {k: v for k, v in body.items() if k != "defaults"}
    return node if isinstance(node, dict) else {}


def option_keys(group: str, option: str) -> list[str]:
    """Return the keys that an option's component takes, as its file has them."""
    return [k for k in component_of(group, option) if k != "_target_"]


def unknown_option(group: str, option: Any, origin: str) -> str | None:
    """Return what is wrong with the choice of an option, or None when the group has it."""
    known = options(group)
    if option is None and (group in OVERLAYS or group.startswith("hydra/")):
        return None
    if isinstance(option, str) and option in known:
        return None
    if isinstance(option, str) and option in PLUGINS.get(group, {}):
        return f"{origin}: `{group}={option}` {_of_plugin(group, option)}\nAvailable here: {', '.join(known)}."
    hint = did_you_mean(show(option), [*known, *OTHER_NAMES.get(group, {})])
    if group == "model":
        hint += f" `model` is its family; the model itself is model_name_or_path={show(option)}."
    return (
        f"{origin}: `{group}` has no option {show(option)!r}.{hint}\nAllowed: {', '.join(known) or '(none here yet)'}."
    )


def _of_plugin(group: str, option: str) -> str:
    """Return what to do about an option of a plugin of Hydra that is not installed."""
    plugin, kind = PLUGINS[group][option], group.removeprefix("hydra/")
    if plugin is None:
        return "is a plugin of Hydra that sftx does not support. Leave it out: a sweep is -m and comma lists."
    return f"needs a plugin of Hydra, which is not tested with sftx: pip install hydra-{plugin}-{kind}."


def family_of_type(model_type: str) -> str | None:
    """Return the option of group `model` that knows a `model_type`, or None."""
    for root in (*user_folders, CONF):
        for path in sorted((root / "model").glob("*.yaml")):
            types = re.search(r"^\s*model_types: *\[(.*)\]", path.read_text(encoding="utf-8"), re.MULTILINE)
            if types and model_type in [t.strip(" \"'") for t in types.group(1).split(",")]:
                return path.stem
    return None
