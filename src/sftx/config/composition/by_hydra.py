"""What Hydra does for sftx: it composes configurations, and runs the trials of a sweep."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize, main
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import configure_log
from hydra.errors import HydraException
from hydra.types import RunMode, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from sftx.config.composition import source
from sftx.config.composition.aliases import set_mirrors

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
    set_mirrors(cfg, hydra.runtime.choices)
    return cfg, hydra


def first_sentence(error: BaseException) -> str:
    """Return the first sentence of a message of Hydra or OmegaConf."""
    message = str(error).strip() or str(error.__cause__ or type(error).__name__)
    cause = str(error.__cause__ or "").split("\n")[0]
    first = re.sub(r"\s+", " ", message.split("\n")[0]).rstrip(".:")
    return f"{first}: {cause.rstrip('.')}." if cause and cause not in first else f"{first}."


def with_overrides(hydra: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Return Hydra's node with these overrides on record, instead of those that were composed to be checked."""
    hydra = hydra.copy()
    words = hydra.job.config.override_dirname
    of_task = [o for o in overrides if not o.lstrip("+~").startswith(("hydra.", "hydra/"))]
    named = sorted(o for o in of_task if o.lstrip("+~").partition("=")[0] not in words.exclude_keys)
    hydra.overrides.task = of_task
    hydra.overrides.hydra = [o for o in overrides if o not in of_task]
    hydra.job.override_dirname = words.item_sep.join(named).replace("=", words.kv_sep)
    return hydra


def run_once(job: TaskFunction, cfg: DictConfig, hydra: DictConfig) -> None:
    """Run a job with a configuration that is composed and checked already, and Hydra's own node of it.

    `hydra.main` would compose twice more, which takes 0.4 seconds, and would run what nobody checked if a file was
    changed in between.
    """
    with open_dict(hydra):
        hydra.mode = RunMode.RUN
        hydra.runtime.output_dir = str(Path(hydra.run.dir).absolute())
    tree = cfg.copy()
    with open_dict(tree):
        tree.hydra = hydra
    HydraConfig.instance().set_config(tree)
    os.environ.update(OmegaConf.to_container(tree.hydra.job.env_set, resolve=True))  # type: ignore[arg-type]
    configure_log(tree.hydra.job_logging, tree.hydra.verbose)
    with open_dict(tree):
        del tree["hydra"]
    job(tree)


def run_by_hydra(job: TaskFunction) -> None:
    """Let Hydra do what `sys.argv` requests: a sweep, a job with Hydra's callbacks, `--info`, completion."""
    main(version_base="1.3", config_path=None, config_name=CONFIG_NAME)(job)()
