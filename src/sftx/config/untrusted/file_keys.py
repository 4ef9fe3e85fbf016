"""What no file may set: the keys by which a configuration would reach past the allowlist.

Asked as each file is read (conf/, `--config-dir` folders, experiments, sweeps, JSON): a file's value may be
hidden at one point of a sweep and come into force at another, and `hydra.searchpath` imports as it is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from hydra.conf import HydraConf

from sftx.config.trees import nodes, remove
from sftx.config.untrusted.allowlist import JOB_NAME
from sftx.config.values import show

TYPED_ONLY: dict[str, Any] = {"allow_targets": [], "trust_remote_code": False}
"""Keys that only a person may set, on the command line, with the one value that a file may hold."""
SHIPPED = {"hydra.run.dir": ".", "hydra.output_subdir": None}
"""Keys that a file may hold only with the value that conf/train.yaml gives them."""
SWEEPER = frozenset({
    "_target_", "params", "search_space", "max_batch_size", "sampler", "direction", "study_name", "n_trials", "n_jobs",
    "max_failure_rate",
})  # fmt: skip
LAUNCHER = frozenset({
    "_target_", "n_jobs", "verbose", "timeout_min", "cpus_per_task", "gpus_per_node", "gpus_per_task",
    "tasks_per_node", "mem_gb", "mem_per_gpu", "mem_per_cpu", "nodes", "name", "partition", "qos", "account",
    "constraint", "exclude", "array_parallelism", "signal_delay_s", "max_num_timeout",
})  # fmt: skip
"""Neither `setup` nor `python` nor `srun_args`: they are commands. A word of these is one word: no line break."""
FILE_MAY_SET: dict[str, frozenset[str] | None] = {
    "mode": None, "verbose": None, "sweep": None, "callbacks": None, "job": frozenset({"name", "config"}),
    "launcher": LAUNCHER, "sweeper": SWEEPER,
}  # fmt: skip
"""The one rule for `hydra.*` in files: these nodes, and of some of them only these keys; the rest must be typed.

Which `_target_` they may name is the allowlist's question.
"""


def bare_name(key: str) -> str:
    """Return a key without `+`, `~` and `@package`."""
    return key.lstrip("+~").partition("@")[0]


def file_problems(body: dict[str, Any], place: Callable[[str], str], package: str = "") -> list[str]:
    """Return what a file sets and may not, and take it out of the body; `place` names the line of a key of the body."""
    problems = []
    head = f"{package}." if package else ""
    for key, _, value in list(nodes(body)):
        problem = setting_problem(f"{head}{key}", value)
        if problem and remove(body, key):
            problems.append(f"{place(key)}: {problem}")
    defaults = body.get("defaults")
    if isinstance(defaults, list):
        checked = [(place(f"defaults.{i}"), placed_elsewhere(entry)) for i, entry in enumerate(defaults)]
        problems += [f"{line}: {problem}" for line, problem in checked if problem]
        body["defaults"] = [entry for entry, (_, problem) in zip(defaults, checked, strict=True) if not problem]
    return problems


def setting_problem(key: str, value: Any) -> str | None:
    """Return why a file may not set a dotted key to this value, or None."""
    parts = bare_name(key).split(".")
    last = bare_name(parts[-1])
    if last in TYPED_ONLY and value != TYPED_ONLY[last]:
        return f"`{key}`: only a person may set this, on the command line: {last}={show(value)}"
    if parts[0] == "hydra" and len(parts) > 1 and not (isinstance(value, dict) and value and len(parts) == 2):
        return _hydra_problem(parts, value)
    if parts[0].startswith("hydra/"):
        return f"`{key}`: Hydra's own options are chosen in the defaults list: `- override /{parts[0]}: {show(value)}`."
    return None


def _hydra_problem(parts: list[str], value: Any) -> str | None:
    key, node, below = ".".join(parts), parts[1], parts[2:]
    if key in SHIPPED and value == SHIPPED[key]:
        return None
    if node in ("overrides", "runtime"):
        return f"`{key}`: Hydra fills this in itself: take it out."
    if node == "searchpath":
        return f"`{key}`: folders of your own are given by --config-dir FOLDER."
    if node not in {f.name for f in fields(HydraConf)}:
        return None  # reported by `hydra_keys`
    keys = FILE_MAY_SET.get(node)
    if node not in FILE_MAY_SET or (keys is not None and below and below[0] not in keys):
        return f"`{key}`: a file may not set this; if you mean it, type it: {key}={show(value)}"
    if below == ["name"] and node == "job" and not JOB_NAME.fullmatch(str(value)):
        return f"`{key}`: expected a name without `/`, got {show(value)}."
    if keys is not None and isinstance(value, str) and re.search(r"[\n\r\0]", value):
        return f"`{key}`: expected one word, got a line break."
    if (
        below[:1] in (["params"], ["search_space"])
        and len(below) > 1
        and bare_name(below[1]).startswith(("hydra", "_"))
    ):
        return f"`{key}`: Hydra's own settings cannot be swept."
    return None


def package_problem(package: str | None, group: str) -> str | None:
    """Return why a component's file may not put its keys there by `# @package`, or None."""
    own = package is None or package in ("_global_", "_group_", group) or package.startswith(f"{group}.")
    return None if own else f"`# @package {package}`: a file of `{group}` sets `{group}` and nothing else."


def placed_elsewhere(entry: Any) -> str | None:
    """Return why an entry of a defaults list, or a typed key, may not put an option elsewhere by `@`, or None."""
    for key in entry if isinstance(entry, dict) else (entry,):
        name, at, package = str(key).rpartition(" ")[2].partition("@")
        group = name.lstrip("+~").strip("/")
        if at and package != group and not package.startswith(f"{group}."):
            return f"`{key}`: an option of `{group}` goes to `{group}` and nowhere else: take out `@{package}`."
    return None
