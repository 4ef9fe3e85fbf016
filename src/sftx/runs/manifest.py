"""`manifest.json`: everything that made a run, and nothing secret."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sftx import INSTALLED, PROJECT_ROOT, __version__

PACKAGES = (
    "torch", "transformers", "tokenizers", "peft", "bitsandbytes", "accelerate", "safetensors", "hydra-core",
    "omegaconf", "numpy", "tensorboard", "wandb", "deepspeed",
)  # fmt: skip
DIFF_LIMIT = 1_000_000
"""Characters of a git diff that are stored."""


def environment() -> dict[str, Any]:
    """Return versions, code state and hardware."""
    import torch

    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {
        "sftx": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {p: v for p in PACKAGES if (v := _version(p))},
        "git": git_state(),
        "hardware": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "gpus": gpus,
            "host": platform.node(),
        },
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def command_line() -> str:
    """Return the command that is running, ready to be typed again."""
    script = os.path.relpath(sys.argv[0]) if sys.argv[0] else ""
    return shlex.join(["python", script, *sys.argv[1:]])


def git_state() -> dict[str, Any]:
    """Return the checkout's commit and the changes on top of it; empty without a checkout or without git."""
    if INSTALLED:
        return {}
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return {}
    diff = _git("diff", "HEAD") or ""
    return {
        "commit": commit.strip(),
        "dirty": bool(_git("status", "--porcelain")),
        "diff": diff if len(diff) <= DIFF_LIMIT else diff[:DIFF_LIMIT] + f"\n... {len(diff) - DIFF_LIMIT} more",
    }


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(PROJECT_ROOT), *words],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
            errors="replace",
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
