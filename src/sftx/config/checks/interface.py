"""What a component must be, group by group, and how one that is not sftx's own is named and checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sftx.config.checks.signature import find
from sftx.config.composition.aliases import MIRRORS
from sftx.config.options import component_of, option_keys, options
from sftx.config.schema import LIST_GROUPS

DOCS = "docs/components.md"


@dataclass(frozen=True)
class Interface:
    """The methods that sftx calls of a group's components."""

    methods: tuple[str, ...]
    wanted: str
    """What to tell a user whose class lacks one of them."""


_SCHEDULE = "derive from sftx.training.schedulers.Schedule and define `shape(step, total)`"
_CALLBACK = "derive from sftx.training.callbacks.Callback"
_MODE = "derive from sftx.model.modes.Lora, QLora or Full"
INTERFACES = {
    "optimizer": Interface(
        ("build",), "define `build(parameters, learning_rate, effective)`, which returns a torch.optim.Optimizer"
    ),
    "scheduler": Interface(("at", "observe", "state", "restore"), _SCHEDULE),
    "callback": Interface(
        ("on_start", "on_batches", "on_step", "on_evaluate", "on_end", "state", "restore"), _CALLBACK
    ),
    "tracker": Interface(
        ("start",), "define `start(folder, config, resume_step)`, which returns what has `log` and `finish`"
    ),
    "mode": Interface(("quantization", "weights_dtype"), _MODE),
}
MIRRORED = ("optimizer", "scheduler")
"""Groups whose mirroring key (`optim`, `lr_scheduler_type`) only names the choice."""


def not_a_component(key: str, target: str) -> str | None:
    """Return why the class that a group's node names cannot be that component, or None."""
    group, _, name = key.partition(".")
    interface = INTERFACES.get(group)
    if interface is None or (group in LIST_GROUPS) != bool(name) or "." in name:
        return None
    found = find(target)
    lacking = next((m for m in interface.methods if not hasattr(found, m)), None)
    if lacking is None:
        return None
    lack = f"not a component of `{group}`: it has no method `{lacking}`"
    return f"{lack}. To write one: {interface.wanted} ({DOCS})."


def left_from_option(key: str, target: str, tree: dict[str, Any]) -> dict[str, str]:
    """Return the keys of the chosen option that is replaced by a typed `_target_`, each with the option."""
    group, _, name = key.partition(".")
    option = name or str(tree.get(MIRRORS.get(group, ""), ""))
    if option not in options(group) or component_of(group, option).get("_target_") == target:
        return {}
    return dict.fromkeys(option_keys(group, option), option)


def name_own_components(tree: Any) -> None:
    """Let `optim` and `lr_scheduler_type` of a composed configuration name the class, where `_target_` was replaced."""
    for group in MIRRORED:
        option, node = tree.get(MIRRORS[group]), tree.get(group)
        target = node.get("_target_") if node is not None else None
        if isinstance(target, str) and option in options(group) and component_of(group, option)["_target_"] != target:
            tree[MIRRORS[group]] = target
