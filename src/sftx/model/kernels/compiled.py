"""TorchInductor on the parts of a model's blocks; key `compile`.

Each part (attention's projections, MLP, norms) is compiled by itself, with any number of rows: blocks are alike, so
each kind of part is compiled once, and no batch is compiled for anew. Attention itself stays as it is: what it does
depends on the rows' lengths. So do recomputation, whose boundaries are the blocks, and the head.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from sftx.model.adapt import AdaptedModel
from sftx.model.kernels.attention import leave_uncompiled
from sftx.model.lora.targets import decoder_layers

VARIANTS = 8
"""How often a function may be compiled anew for a trial: in training, in evaluation, first block, other blocks, ..."""
COMPILER_LOG = "torch._dynamo.convert_frame"
COMPILERS = ("g++", "clang++", "c++")


def missing_for_compiling(device: torch.device, *, sharded: bool) -> str | None:
    """Return why nothing can be compiled here, or None."""
    if sharded:
        return "DeepSpeed gathers each layer's parameters by hooks"
    if not (shutil.which(os.environ.get("CXX") or "g++") or any(map(shutil.which, COMPILERS))):
        return "TorchInductor needs a C++ compiler (g++)" + (", also for a GPU" if device.type == "cuda" else "")
    return _missing_for_triton() if device.type == "cuda" else None


def _missing_for_triton() -> str | None:
    """Return what Triton lacks to build the modules that launch its kernels, or None."""
    chosen = os.environ.get("CC")
    if not any(map(shutil.which, [chosen] if chosen else ["gcc", "clang"])):
        return "Triton needs a C compiler (gcc)" + (f": there is no `{chosen}`, which CC names" if chosen else "")
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    return None if header.is_file() else f"Triton needs Python's header {header} (python3-dev)"


def compile_blocks(model: AdaptedModel, attention: str, trials: int) -> None:
    """Compile the parts of a model's blocks at their first call, for each of several trials."""
    import torch._dynamo.config

    torch.compiler.reset()  # what an earlier run in this process compiled does not count
    torch._dynamo.config.recompile_limit = VARIANTS * trials
    leave_uncompiled(attention)
    for block in decoder_layers(model.module):
        for part in block.children():
            part.compile(dynamic=True)


class _Limits(logging.Filter):
    """Takes torch's message that a function reached its recompile limit, and reports it."""

    def __init__(self, notice: Callable[[str], None]) -> None:
        super().__init__()
        self._notice = notice

    def filter(self, record: logging.LogRecord) -> bool:
        """Return False for that message: sftx reports it."""
        message = record.getMessage()
        if "recompile_limit" not in message:
            return True
        function = re.search(r"function: (.*)", message)
        self._notice(function[1] if function else message.splitlines()[0])
        return False


@contextmanager
def limits_noticed(notice: Callable[[str], None]) -> Iterator[None]:
    """Call `notice` inside the block with the name of each function that reaches torch's recompile limit."""
    log, limits = logging.getLogger(COMPILER_LOG), _Limits(notice)
    log.addFilter(limits)
    try:
        yield
    finally:
        log.removeFilter(limits)
