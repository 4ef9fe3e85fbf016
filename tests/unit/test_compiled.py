"""`compile=true` on a GPU also needs what Triton builds its launchers with."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import pytest
import torch

from sftx.model.kernels.compiled import missing_for_compiling

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Return the compilers that are found; Python's header is there."""
    compilers = {"g++", "gcc"}
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(shutil, "which", lambda name: name if name in compilers else None)
    monkeypatch.setattr(sysconfig, "get_paths", lambda *_, **__: {"include": str(tmp_path)})
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    return compilers


def test_a_gpu_needs_both_compilers_and_the_header(installed: set[str], tmp_path: Path) -> None:
    assert missing_for_compiling(GPU, sharded=False) is None
    (tmp_path / "Python.h").unlink()
    reason = missing_for_compiling(GPU, sharded=False)
    assert reason is not None
    assert "Python.h" in reason
    assert missing_for_compiling(CPU, sharded=False) is None


@pytest.mark.parametrize(("have", "cc", "enough"), [
    ({"g++"}, None, False), ({"g++", "clang"}, None, True), ({"g++", "gcc"}, "icc", False), ({"g++", "icc"}, "icc", True),
])  # fmt: skip
def test_triton_takes_cc_or_gcc_or_clang(installed, monkeypatch, have: set[str], cc: str | None, enough: bool) -> None:
    installed.clear()
    installed |= have
    if cc:
        monkeypatch.setenv("CC", cc)
    reason = missing_for_compiling(GPU, sharded=False)
    assert (reason is None) == enough
    assert enough or "C compiler" in str(reason)
    assert missing_for_compiling(CPU, sharded=False) is None


def test_torchinductor_needs_a_cpp_compiler(installed: set[str]) -> None:
    installed.remove("g++")
    for device in (CPU, GPU):
        assert "C++ compiler" in str(missing_for_compiling(device, sharded=False))
