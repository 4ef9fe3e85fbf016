"""Number formats of the computation; group `precision`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sftx.effective import Effective
from sftx.errors import ConfigError

if TYPE_CHECKING:  # imported when the format is resolved, not when its settings are checked
    import torch


@dataclass(frozen=True)
class Numerics:
    """The formats in force on a device."""

    dtype: torch.dtype
    device: torch.device
    sharded: bool = False
    """DeepSpeed's weights are in `dtype` themselves; it warns of an autocast around it, and turns that off."""

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context that the forward pass runs in."""
        import torch

        if self.sharded or self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


@dataclass(frozen=True)
class Precision:
    """The requested format; `tf32` lets fp32 matrix products round to TF32 on the GPU."""

    dtype: Literal["float16", "bfloat16", "float32"]
    tf32: bool

    def resolve(self, device: torch.device, effective: Effective, *, sharded: bool) -> Numerics:
        """Return what the device can do, recording a fallback.

        Raises:
            ConfigError: the GPU has no bfloat16.
        """
        import torch

        requested: torch.dtype = getattr(torch, self.dtype)
        key = {"float16": "fp16", "bfloat16": "bf16"}.get(self.dtype, "precision")
        if device.type == "cpu" and requested != torch.float32:
            effective.fall_back(key, True, "fp32", "half precision on a CPU is many times slower than fp32")
            requested = torch.float32
        if device.type == "cuda":
            if requested == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
                raise ConfigError(f"`bf16=true`: {torch.cuda.get_device_name(device)} has no bfloat16. Use fp16=true.")
            torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
            effective.settings["tf32"] = self.tf32
        elif self.tf32:
            effective.fall_back("precision.tf32", True, "false", "TF32 is a format of NVIDIA GPUs")
        effective.settings["compute_dtype"] = str(requested).removeprefix("torch.")
        return Numerics(requested, device, sharded)
