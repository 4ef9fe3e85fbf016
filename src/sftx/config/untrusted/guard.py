"""Guard a composition before Hydra gets it: what would run, and privileges that were not typed."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from sftx.config.untrusted.allowlist import pattern_problem, unlisted_hydra
from sftx.config.untrusted.file_keys import TYPED_ONLY
from sftx.config.values import Origin, show


def guard(cfg: DictConfig, hydra: DictConfig, privileges: dict[str, Any], origin: Origin) -> list[str]:
    """Return what Hydra's own tree would run and may not, and the privileges that were not typed."""
    return [*unlisted_hydra(_plain(hydra), _patterns(privileges), origin), *untyped_privileges(cfg, privileges, origin)]


def untyped_privileges(cfg: DictConfig, privileges: dict[str, Any], origin: Origin) -> list[str]:
    """Return a problem for each key that only a person may set and that has another value than was typed."""
    raw = _plain(cfg)
    return [
        f"{origin(key)}: `{key}`: found {show(raw[key])}, but only a person may set this, on the command line."
        for key, typed in privileges.items()
        if key in raw and raw[key] not in (typed, TYPED_ONLY[key])
    ]


def _patterns(privileges: dict[str, Any]) -> list[str]:
    patterns = privileges["allow_targets"]
    return patterns if isinstance(patterns, list) and not any(map(pattern_problem, patterns)) else []


def _plain(tree: DictConfig) -> dict[str, Any]:
    return {str(k): v for k, v in (OmegaConf.to_container(tree, resolve=False) or {}).items()}  # type: ignore[union-attr]
