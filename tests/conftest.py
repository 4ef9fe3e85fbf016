"""Shared by all tests: configurations made as the command line makes them, and runs in this process."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("WANDB_MODE", "offline")
os.environ["COLUMNS"] = "160"  # a message is not broken where a temporary path happens to end

_CACHE = tempfile.TemporaryDirectory(prefix="sftx-tests-", ignore_cleanup_errors=True)
os.environ["SFTX_CACHE"] = _CACHE.name  # a cache of before would hide that the code has broken since

SMALL = (
    "max_train_rows=40",
    "eval_max_rows=6",
    "eval_ratio=0.15",
    "max_seq_length=96",
    "gradient_accumulation_steps=4",
    "max_steps=3",
    "warmup_steps=0",
    "logging_steps=1",
    "learning_rate=1e-3",
    "lora_rank=8",
    "gradient_checkpointing=false",
    "disable_tqdm=true",
    "report_to=none",
    "save_strategy='no'",
)
"""A run of a second or two on the embedded model."""


def over(usual: Sequence[str], *typed: str) -> list[str]:
    """Return settings with what is typed over them: each key once."""
    names = {w.split("=", 1)[0] for w in typed}
    return [*(w for w in usual if w.split("=", 1)[0] not in names), *typed]


TWO_RANKS = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
"""Launches two processes, which meet at a port that is free."""


@dataclass
class Captured:
    """What a run was made of, for tests that look at tensors, rows and optimizers."""

    session: Any = None
    trials: list[Any] = field(default_factory=list)

    @property
    def trial(self) -> Any:
        return self.trials[0]


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., Any]:
    """Return a function that composes `overrides`, as `python train.py` would, into a TrainConfig."""

    def make(*overrides: str, small: bool = True, output: str = "run") -> Any:
        from sftx.config.checks.check import freeze
        from sftx.config.composition.prepare import compose_checked

        typed = {o.split("=", 1)[0] for o in overrides}
        base = [o for o in SMALL if small and o.split("=", 1)[0] not in typed]
        if "output_dir" not in typed:
            base.append(f"output_dir={tmp_path / output}")
        return freeze(compose_checked([*base, *overrides]))

    return make


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Captured:
    """Let a run leave its session and trials here."""
    import sftx.run

    capture = Captured()
    train = sftx.run.train

    def keep(session: Any, trials: Any, *rest: Any) -> None:
        capture.session, capture.trials = session, list(trials)
        train(session, trials, *rest)

    monkeypatch.setattr(sftx.run, "train", keep)
    return capture


@pytest.fixture
def cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs `python train.py` in a process of its own."""

    def call(*words: str, launcher: tuple[str, ...] = (), timeout: float = 240, **env: str) -> Any:
        command = [*(launcher or (sys.executable,)), "train.py", *words]
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | env
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)

    return call


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real instruction data, or skip."""
    folder = os.environ.get("SFTX_SHARED")
    if not folder or not Path(folder, "data").is_dir():
        pytest.skip("SFTX_SHARED names no folder with data/: the real instruction files are not here")
    return Path(folder, "data")


@pytest.fixture
def fp16_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs on a CPU compute in fp16 with a loss scaler, as a GPU does by default."""
    import torch

    from sftx.training.precision import Numerics, Precision

    def resolve(self: Precision, device: torch.device, effective: object, *, sharded: bool) -> Numerics:
        return Numerics(torch.float16, device, sharded)

    monkeypatch.setattr(Precision, "resolve", resolve)


@pytest.fixture(autouse=True)
def no_config_dir() -> Any:
    """Forget what a command line of the last test gave as `--config-dir`."""
    yield
    options = sys.modules.get("sftx.config.options")
    if options:
        options.user_folders.clear()


@pytest.fixture
def my_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that writes `my_parts.py`, which can then be imported; nothing of it outlives the test."""
    from sftx.config.checks import signature

    def forget() -> None:
        sys.modules.pop("my_parts", None)
        for read in vars(signature).values():
            if hasattr(read, "cache_clear"):
                read.cache_clear()

    def write(text: str) -> None:
        (tmp_path / "my_parts.py").write_text(text, encoding="utf-8")
        monkeypatch.syspath_prepend(str(tmp_path))
        forget()

    yield write
    forget()


@pytest.fixture
def one_thread() -> Any:
    """Run torch on one thread: sums are then made in one order, and equal means bitwise equal."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
