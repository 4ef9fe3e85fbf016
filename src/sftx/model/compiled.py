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
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from sftx.model.adapt import AdaptedModel
from sftx.model.attention import leave_uncompiled
from sftx.model.targets import blocks_of

VARIANTS = 8
"""How often a function may be compiled anew for a trial: in training, in evaluation, first block, other blocks, ..."""
COMPILER_LOG = "torch._dynamo.convert_frame"
COMPILERS = ("g++", "clang++", "c++")


def missing_for_compiling(device: torch.device, *, sharded: bool) -> str | None:
    """Return why nothing can be compiled here, or None."""
    if sharded:
        return "DeepSpeed gathers each layer's parameters by hooks"
    if shutil.which(os.environ.get("CXX") or "g++") or any(map(shutil.which, COMPILERS)):
        return None
    return "TorchInductor needs a C++ compiler (g++)" + (", also for a GPU" if device.type == "cuda" else "")


def compile_blocks(model: AdaptedModel, attention: str, trials: int) -> None:
    """Compile the parts of a model's blocks at their first call, for each of several trials."""
    import torch._dynamo.config

    torch.compiler.reset()  # what an earlier run in this process compiled does not count
    torch._dynamo.config.recompile_limit = VARIANTS * trials
    leave_uncompiled(attention)
    for block in blocks_of(model.module):
        for part in block.children():
            part.compile(dynamic=True)


class _Limits(logging.Filter):
    """Takes torch's message that a function is compiled for no more inputs, and hands it on."""

    def __init__(self, notice: Callable[[str], None]) -> None:
        super().__init__()
        self._notice = notice

    def filter(self, record: logging.LogRecord) -> bool:
        """Return False for that message: it is said in sftx's words."""
        message = record.getMessage()
        if "recompile_limit" not in message:
            return True
        function = re.search(r"function: (.*)", message)
        self._notice(function[1] if function else message.splitlines()[0])
        return False


@contextmanager
def limits_noticed(notice: Callable[[str], None]) -> Iterator[None]:
    """Call `notice` with the name of each function that torch compiles for no more inputs, inside the block."""
    log, limits = logging.getLogger(COMPILER_LOG), _Limits(notice)
    log.addFilter(limits)
    try:
        yield
    finally:
        log.removeFilter(limits)
