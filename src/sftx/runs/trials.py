"""One Hydra job, and the table at the end of several.

Each trial of a multirun leaves `trial.json` in its folder, whether it failed or not; the table at the
end is made from those, so that it does not matter which launcher ran the trials.
"""

from __future__ import annotations

import gc
import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.markup import escape
from rich.table import Table

from sftx.config.checks.check import freeze
from sftx.config.composition.aliases import set_mirrors
from sftx.config.composition.prepare import Request
from sftx.config.schema import TrainConfig
from sftx.config.untrusted.guard import untyped_privileges
from sftx.data.files.sources import find_sources
from sftx.errors import ConfigError, SftxError, StoppedError, put_place, say
from sftx.files import write_json, write_text
from sftx.runs.launch import launch
from sftx.runs.result import Result, single
from sftx.secrets import scrub, scrub_text
from sftx.terminal import counted, visible
from sftx.training.saving.run_folder import RunFolder

log = logging.getLogger("sftx")
TRIAL = "trial.json"
_sweep_dirs: list[Path] = []


class TrialFailed(Exception):
    """Tells Hydra's launcher that a trial failed; its own message is already out."""


def run_job(composed: DictConfig, request: Request) -> float | None:
    """Run one composed configuration; in a multirun, in its own folder, leaving its outcome there.

    Raises:
        SftxError: what the user can fix, with the file and line that set the key it is about.
    """
    try:
        return _run_job(composed, request)
    except SftxError as error:
        put_place(error, request.places)
        raise


def _run_job(composed: DictConfig, request: Request) -> float | None:
    hydra = HydraConfig.get()
    set_mirrors(composed, hydra.runtime.choices)
    problems = untyped_privileges(composed, request.privileges, lambda _: "config")
    if problems:
        raise ConfigError(problems)
    config = freeze(composed)
    command = request.command()
    if hydra.mode != RunMode.MULTIRUN:
        return _train(config, request, command).objective
    sweep_dir = Path(hydra.sweep.dir)
    _sweep_dirs.append(sweep_dir)
    _scrub_record(sweep_dir / "multirun.yaml")
    folder = Path(config.output_dir or sweep_dir) / str(hydra.sweep.subdir)
    outcome: dict[str, Any] = {
        "number": int(hydra.job.num),
        "overrides": _swept(hydra),
        "output_dir": str(folder),
    }
    print(f"\n--- trial {hydra.job.num}: {' '.join(outcome['overrides'])}")
    try:
        result = _train(replace(config, output_dir=str(folder)), request, command)
    except Exception as error:
        put_place(error, request.places)
        code = say(error)
        outcome |= {"status": "failed", "exit_code": code, "error": f"{type(error).__name__}: {error}"}
        _leave(sweep_dir, outcome)
        if isinstance(error, StoppedError):  # Hydra would start the next trial after any `Exception`
            raise SystemExit(end_of_sweep()) from error
        raise TrialFailed(str(error)) from error
    outcome |= {"status": "completed", "eval_loss_before": result.eval_loss_before, "eval_loss": result.eval_loss}
    _leave(sweep_dir, outcome)
    return result.objective


def _train(config: TrainConfig, request: Request, command: str) -> Result:
    """Look at the folder and the corpus first, where mistakes are common; only then import torch."""
    if config.output_dir is not None:
        RunFolder(Path(config.output_dir)).check(config.resume)
    find_sources(config.train_file_path, config.train_file_name, key="train_file_name")
    if "torch" in sys.modules:
        gc.collect()  # the model of the trial before
    gc.disable()  # until training begins, as in train.py
    return single(launch([config], request.notes, command))


def _scrub_record(path: Path) -> None:
    """Take out of Hydra's own record of a sweep what was typed and is secret."""
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        if scrub_text(text) != text:
            write_text(path, scrub_text(text))


def _swept(hydra: Any) -> list[str]:
    """Return the overrides in which the trials differ, or all when there is nothing to compare with."""
    return [str(o) for o in OmegaConf.to_container(hydra.overrides.task) or []]


def _leave(sweep_dir: Path, outcome: dict[str, Any]) -> None:
    write_json(sweep_dir / str(outcome["number"]) / TRIAL, scrub(outcome))


def end_of_sweep() -> int:
    """Print the trials by eval loss and return the exit code: non-zero when one failed."""
    code = 0
    for folder in dict.fromkeys(_sweep_dirs):
        outcomes = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob(f"*/{TRIAL}"))]
        code = max([code, *(o.get("exit_code", 0) for o in outcomes)])
        from rich.console import Console

        Console(width=None).print(table_of(outcomes, folder))
    return code


def table_of(outcomes: list[dict[str, Any]], folder: Path) -> Table:
    """Return the trials as a table: best eval loss first, failed ones last."""
    order = sorted(outcomes, key=lambda o: (o["status"] != "completed", _rank(o), o["number"]))
    shared = set.intersection(*(set(o["overrides"]) for o in outcomes)) if len(outcomes) > 1 else set()
    table = Table(title=f"{counted(len(outcomes), 'trial')} in {folder}", title_justify="left")
    for column in ("trial", "differs in", "eval loss", "before", "status"):
        table.add_column(column, justify="right" if column in ("eval loss", "before") else "left", overflow="fold")
    for o in order:
        differs = " ".join(v for v in o["overrides"] if v not in shared)
        status = o["status"] if o["status"] == "completed" else f"failed: {o['error'].splitlines()[0][:120]}"
        differs, status = (escape(visible(text)) for text in (differs, status))  # `[x]` is markup to rich
        table.add_row(str(o["number"]), differs, _loss(o.get("eval_loss")), _loss(o.get("eval_loss_before")), status)
    return table


def _rank(outcome: dict[str, Any]) -> float:
    loss = outcome.get("eval_loss")
    return float("inf") if loss is None else float(loss)


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
