"""What Hydra does for sftx: it composes a configuration, and runs a job with the one that was checked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from hydra import compose, initialize, main
from hydra._internal.config_loader_impl import get_overrides_dirname
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import configure_log
from hydra.errors import HydraException
from hydra.types import TaskFunction
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from sftx.config import source

CONFIG_NAME = "train"
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, ValueError)
"""What Hydra raises over a configuration that does not compose."""


def register_sources() -> None:
    """Teach Hydra to read `conf/` and `sweeps/` through `SftxConfigSource`."""
    plugins = Plugins.instance()
    plugins.register(source.SftxConfigSource)
    plugins.register(source.SftxSearchPath)


def load(overrides: list[str]) -> tuple[DictConfig, DictConfig]:
    """Compose, and return the job's configuration and Hydra's own."""
    GlobalHydra.instance().clear()
    try:
        with initialize(version_base="1.3", config_path=None, job_name=CONFIG_NAME):
            cfg = compose(CONFIG_NAME, overrides=overrides, return_hydra_config=True)
    finally:
        GlobalHydra.instance().clear()
    hydra = cfg.hydra
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg, hydra


def first_sentence(error: BaseException) -> str:
    """Keep the first sentence of what Hydra or OmegaConf says."""
    message = str(error).strip() or str(error.__cause__ or type(error).__name__)
    cause = str(error.__cause__ or "").split("\n")[0]
    first = re.sub(r"\s+", " ", message.split("\n")[0]).rstrip(".:")
    return f"{first}: {cause.rstrip('.')}." if cause and cause not in first else f"{first}."


def whole(cfg: DictConfig, hydra: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Return both parts of a composition as one tree, in which Hydra keeps a record of these overrides."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    of_task = [o for o in parsed if not o.is_hydra_override()]
    hydra.overrides.task = [o.input_line for o in of_task]
    hydra.overrides.hydra = [o.input_line for o in parsed if o.is_hydra_override()]
    hydra.job.override_dirname = get_overrides_dirname(overrides=of_task, **hydra.job.config.override_dirname)
    tree = cfg.copy()
    with open_dict(tree):
        tree.hydra = hydra
    return tree


class _Composed(Hydra):
    """Hydra, which finds its configuration composed."""

    composed: DictConfig

    def compose_config(self, *_: Any, **__: Any) -> DictConfig:
        configure_log(self.composed.hydra.hydra_logging, self.composed.hydra.verbose)
        return self.composed


def run(job: TaskFunction, composed: DictConfig | None = None) -> None:
    """Run a job with a configuration that was composed and checked, or with what the command line composes to.

    Hydra itself composes twice before it runs a job. That takes 0.4 seconds, and if a file was changed in between, it
    may run what nobody checked.
    """
    if composed is None:
        main(version_base="1.3", config_path=None, config_name=CONFIG_NAME)(job)()
        return
    hydra = _Composed.create_main_hydra2(CONFIG_NAME, create_config_search_path(None))
    assert isinstance(hydra, _Composed)
    hydra.composed = composed
    try:
        hydra.run(CONFIG_NAME, job, [])
    finally:
        GlobalHydra.instance().clear()
