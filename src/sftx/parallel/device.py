"""The device of a rank, and whether this build of torch can use it."""

from __future__ import annotations

import os
import re

import torch

from sftx.errors import ConfigError
from sftx.parallel import supervised


def choose_device(requested: str, local_rank: int) -> torch.device:
    """Return the device of a rank: `auto` takes a GPU when there is one.

    Raises:
        ConfigError: a GPU was requested and there is none, none that is this rank's own, or one that torch cannot use.
    """
    if requested == "cuda" and not torch.cuda.is_available():
        raise ConfigError("`device=cuda`: torch sees no GPU here. Use device=auto, or install torch's CUDA build.")
    if requested == "cpu" or not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers imports DeepSpeed where it finds it
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if gpus == 1 and not _shares_environment():
        local_rank = 0
    if local_rank >= gpus:
        raise ConfigError(
            f"`parallel`: more than {local_rank} processes were started here, but torch sees {gpus} GPUs, and each "
            f"needs its own: parallel.num_processes={gpus}, or device=cpu."
        )
    device = torch.device("cuda", local_rank)
    _check_architecture(device)
    return device


def _shares_environment() -> bool:
    """Return True if the other ranks see the same GPUs.

    torchrun and sftx's supervisor start all ranks with one environment. Other launchers may show each task only its
    own GPU (`srun --gpus-per-task=1`), which is then `cuda:0` whatever LOCAL_RANK is.
    """
    return "TORCHELASTIC_RUN_ID" in os.environ or supervised.current is not None


def _check_architecture(device: torch.device) -> None:
    """Compare the GPU's compute capability with those that torch was compiled for.

    Raises:
        ConfigError: torch has no kernels for this GPU.
    """
    compiled = torch.cuda.get_arch_list() if torch.version.hip is None else []
    major, minor = torch.cuda.get_device_capability(device)
    if not compiled or any(_runs_on(architecture, major, minor) for architecture in compiled):
        return
    raise ConfigError(
        f"`device`: {torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, and this build of "
        f"torch {torch.__version__} has kernels for {', '.join(compiled)} only. Install a build for this GPU, "
        f"for example: make train TORCH_INDEX=https://download.pytorch.org/whl/cu126; or use device=cpu."
    )


def _runs_on(architecture: str, major: int, minor: int) -> bool:
    """Return True if code for an architecture (`sm_80`, `sm_90a`, `compute_120`) runs on a compute capability."""
    found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture)
    if found is None:
        return True  # an unknown notation is no reason to refuse
    kind, code_major, code_minor, suffix = found[1], int(found[2]), int(found[3]), found[4]
    if suffix == "a":
        return (code_major, code_minor) == (major, minor)
    if kind == "compute" and not suffix:  # PTX is compiled by the driver for any newer GPU
        return (code_major, code_minor) <= (major, minor)
    return code_major == major and code_minor <= minor
