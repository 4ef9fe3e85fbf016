"""A run in this process, or as several ranks of this machine; decided before torch is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from sftx.config.options import user_folders
from sftx.config.schema import TrainConfig
from sftx.errors import SftxError, StoppedError
from sftx.parallel.supervisor import Supervisor
from sftx.runs.result import Result, Results
from sftx.training.saving.run_folder import RunFolder

COUNT_GPUS = "import torch; print(torch.cuda.device_count())"


def launch(configs: Sequence[TrainConfig], notes: Sequence[str], command: str) -> Results:
    """Train configurations that share base and data to their ends; return the outcome of each.

    Raises:
        SftxError: any error the user can fix; with several ranks, the one that ended the first of them.
    """
    count = count_ranks(configs[0])
    if count > 1:
        return _as_ranks(configs, count, [*notes, *_share_cores(count)], command)
    from sftx.run import run

    return run(configs, [*notes, *_alone(configs[0])], command)


def count_ranks(config: TrainConfig) -> int:
    """Return how many processes are to be started: one when a launcher has started this one already."""
    if "RANK" in os.environ or "num_processes" not in config.parallel:
        return 1
    requested: int | None = config.parallel["num_processes"]
    if requested is None:
        return max(1, 0 if config.device == "cpu" else _count_gpus())
    return requested


def _count_gpus() -> int:
    """Let another process ask: torch would stay in this one, and CUDA cannot be left again."""
    done = subprocess.run([sys.executable, "-P", "-c", COUNT_GPUS], capture_output=True, text=True, check=True)
    return int(done.stdout)


def _alone(config: TrainConfig) -> list[str]:
    unasked = config.parallel.get("num_processes", 1) is None and "RANK" not in os.environ
    return ["one process: parallel.num_processes=N starts N, and by default one for each GPU"] if unasked else []


def _share_cores(count: int) -> list[str]:
    if "OMP_NUM_THREADS" in os.environ:
        return []
    cores, each = len(os.sched_getaffinity(0)), threads_each(count)
    return [f"each of the {count} processes computes with {each} of {cores} cores; OMP_NUM_THREADS sets another number"]


def threads_each(count: int) -> int:
    """Return with how many threads each of so many processes computes that are started here, unless it is set."""
    return max(1, len(os.sched_getaffinity(0)) // count)


def _as_ranks(configs: Sequence[TrainConfig], count: int, notes: list[str], command: str) -> Results:
    settings = configs[0].parallel
    supervisor = Supervisor(
        count,
        module="sftx.runs.rank",
        hang_seconds=settings.get("hang_seconds"),
        timeout_seconds=settings.get("timeout_seconds", 1800),
    )
    order = {
        "configs": [asdict(config) for config in configs],
        "notes": notes,
        "command": command,
        "path": list(sys.path),
        "argv": list(sys.argv),
        "folders": [str(f) for f in user_folders],
    }
    # Ranks of one machine need no other address than its own, and its name may not lead to it.
    defaults = {"OMP_NUM_THREADS": str(threads_each(count)), "GLOO_SOCKET_IFNAME": "lo"}
    try:
        messages = supervisor.supervise(order, defaults | os.environ)
    except SftxError as error:
        for folder in supervisor.main.messages.get("folders", ()):
            RunFolder(Path(folder)).note_end("stopped" if isinstance(error, StoppedError) else "failed", error)
        raise
    return [Result.of(plain) for plain in messages["finished"]]
