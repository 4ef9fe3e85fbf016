"""How fast training is: tokens, padding, waiting, memory, and the share of what the machine could do (MFU)."""

from __future__ import annotations

import math
import re
import resource
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from sftx.data.batches.feed import Step

DENSE_FLOPS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "H800": 989e12,
    "H20": 148e12, "B200": 2250e12, "GB200": 2500e12, "A100": 312e12, "A800": 312e12, "A40": 150e12, "A30": 165e12,
    "A10": 125e12, "A10G": 70e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "V100": 125e12, "V100S": 130e12,
    "T4": 65e12,
    "RTX 5090": 210e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip
"""Half-precision operations a second without sparsity, from NVIDIA's data sheets; the first name that fits counts."""
OTHER_GPU = r"\w| (?:D|Ti|SUPER|Laptop)\b"
"""What must not follow a name: it would be another GPU's."""
TF32_PART, FP32_PART = 1 / 2, 1 / 16
"""Of the half-precision rate, on GPUs that have TF32."""
PROBE, PROBE_SECONDS = 768, 0.2
"""Rows of the square product that a CPU's rate is measured on, and for how long: the best time counts."""


@dataclass
class Window:
    """Sums since the last train-loss record; tokens of all ranks, the rest this rank's."""

    loss: float = 0.0
    weight: float = 0.0
    supervised_tokens: int = 0
    tokens: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    """For the next step's batches; part of `seconds`."""
    own_tokens: int = 0
    slots: int = 0
    """Tokens and padding."""
    flops: int = 0
    """Those that the work needs; none where they cannot be counted."""

    def add(self, step: Step, flops: int, seconds: float) -> None:
        """Count a step that was made."""
        self.supervised_tokens += step.supervised_tokens
        self.tokens += step.tokens
        self.own_tokens += sum(b.tokens for b in step.batches)
        self.slots += sum(b.ids_BT.numel() for b in step.batches)
        self.flops += flops
        self.seconds += seconds

    def metrics(self, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
        """Return `perf/*`."""
        seconds = max(self.seconds, 1e-9)
        found = {
            "perf/tokens_per_second": self.tokens / seconds,
            "perf/supervised_tokens_per_second": self.supervised_tokens / seconds,
            "perf/padding": 1 - self.own_tokens / self.slots if self.slots else 0.0,
            "perf/data_wait": self.waited / seconds,
            "perf/peak_memory_gb": peak_memory(device) / 1e9,
        }
        if self.flops:
            found["perf/tflops"] = self.flops / seconds / 1e12
            if peak := peak_flops(device, dtype):
                found["perf/mfu"] = self.flops / seconds / peak
        return found


def peak_memory(device: torch.device) -> int:
    """Return the most bytes held so far: on the GPU by tensors, else by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` count from here; a system that cannot do so for a process keeps the higher peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of the resident set


@cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the operations a second that MFU is a share of: a GPU's data sheet, or measured on a CPU."""
    if device.type == "cuda":
        return _of_gpu(torch.cuda.get_device_name(device), dtype)
    left, right = torch.randn(PROBE, PROBE), torch.randn(PROBE, PROBE)
    best, begun = math.inf, time.perf_counter()
    while (start := time.perf_counter()) < begun + PROBE_SECONDS:
        torch.mm(left, right)
        best = min(best, time.perf_counter() - start)
    return 2 * PROBE**3 / best


def _of_gpu(name: str, dtype: torch.dtype) -> float | None:
    half = next((rate for known, rate in DENSE_FLOPS.items() if _is_named(name, known)), None)
    if half is None or dtype != torch.float32:
        return half
    return half * (TF32_PART if torch.get_float32_matmul_precision() != "highest" else FP32_PART)


def _is_named(name: str, known: str) -> bool:
    """Return True if a GPU's full name holds a name of the table as whole words."""
    return re.search(rf"(?<!\w){known}(?!{OTHER_GPU})", name) is not None
