"""Deterministic kernels on a GPU; key `deterministic`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sftx.errors import ConfigError

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
REPRODUCIBLE = (":4096:8", ":16:8")
"""Values with which cuBLAS sums in the same order each time."""
MISSING = "does not have a deterministic implementation"
"""What torch says of an operation that it refuses."""
EXPECTED = {
    "cpu": "bitwise equal on a CPU, with the same versions and number of threads",
    "deterministic": "bitwise equal on the same GPU model and versions (deterministic=true)",
    "cuda": "equal but for rounding: on a GPU without deterministic=true, sums are made in any order",
}
"""What a repetition of a run can be held to."""


@contextmanager
def deterministic_kernels(requested: bool) -> Iterator[None]:
    """Let torch use deterministic kernels only, if requested, and undo it at the end; to be entered before CUDA starts.

    Raises:
        ConfigError: an operation of the model has no deterministic kernel.
    """
    if not requested:
        yield
        return
    variable = os.environ.get(CUBLAS)
    if variable not in REPRODUCIBLE:
        os.environ[CUBLAS] = REPRODUCIBLE[0]
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if MISSING not in str(error):
            raise
        operation = str(error).split(MISSING)[0].strip()
        raise ConfigError(
            f"`deterministic=true`: {operation} has no deterministic kernel on this device. Use deterministic=false."
        ) from error
    finally:
        torch.use_deterministic_algorithms(before)
        if variable is None:
            del os.environ[CUBLAS]
        else:
            os.environ[CUBLAS] = variable


def repeatability(device: str, *, deterministic: bool) -> str:
    """Return what a repetition of a run on a kind of device (`cpu`, `cuda`) can be held to."""
    return EXPECTED["deterministic" if device == "cuda" and deterministic else device]
