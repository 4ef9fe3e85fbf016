"""The Triton kernel compiles for the GPUs that people have, and gives what torch gives."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.fake_gpu import kernels

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is missing: make test-triton"
)


def run(task: str, cache: Path, **environment: str) -> list[str]:
    """Return the lines that `kernels` prints; TRITON_INTERPRET counts only in a new process."""
    command = [sys.executable, "-m", "tests.fake_gpu.kernels", task]
    env = os.environ | {"TRITON_CACHE_DIR": str(cache)} | environment
    root = Path(__file__).resolve().parents[2]
    ended = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


def test_kernel_compiles_for_each_architecture(tmp_path: Path) -> None:
    """Turing, Ampere and Hopper; two sizes of block, with and without derivatives."""
    assert len(run("compile", tmp_path)) == len(kernels.CAPABILITIES) * len(kernels.LOGITS) * 4


def test_interpreted_kernel_gives_what_torch_gives(tmp_path: Path) -> None:
    lines = run("interpret", tmp_path, TRITON_INTERPRET="1")
    assert len(lines) == len(kernels.LOGITS) * len(kernels.VOCABULARIES)
