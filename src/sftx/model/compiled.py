"""TorchInductor on the parts of a model's blocks; key `compile`.

Each part (attention's projections, MLP, norms) is compiled by itself, with any number of rows: blocks are alike, so
each kind of part is compiled once, and no batch is compiled for anew. Attention itself stays as it is: what it does
depends on the rows' lengths. So do recomputation, whose boundaries are the blocks, and the head.
"""

from __future__ import annotations

import os
import shutil

import torch

from sftx.model.adapt import AdaptedModel
from sftx.model.attention import leave_uncompiled
from sftx.model.dropout import KeyedDropout
from sftx.model.targets import blocks_of

COMPILERS = ("g++", "clang++", "c++")


def missing_for_compiling(device: torch.device, *, sharded: bool) -> str | None:
    """Return why nothing can be compiled here, or None."""
    if sharded:
        return "DeepSpeed gathers each layer's parameters by hooks"
    if shutil.which(os.environ.get("CXX") or "g++") or any(map(shutil.which, COMPILERS)):
        return None
    return "TorchInductor needs a C++ compiler (g++)" + (", also for a GPU" if device.type == "cuda" else "")


def compile_blocks(model: AdaptedModel, attention: str) -> None:
    """Compile the parts of a model's blocks at their first call."""
    leave_uncompiled(attention)
    KeyedDropout.keep = torch.compiler.disable(KeyedDropout.keep)  # type: ignore[method-assign]
    for block in blocks_of(model.module):
        for part in block.children():
            part.compile(dynamic=True)
