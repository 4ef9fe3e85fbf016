"""Liger's kernels for SwiGLU, rotary positions and RMSNorm, applied by transformers' own integration."""

from __future__ import annotations

from typing import Any

import torch

MISSING = "the package liger-kernel is not installed: pip install 'sftx[gpu]'"
PARTS = {"rope": True, "swiglu": True, "geglu": True, "rms_norm": True, "layer_norm": True}
"""What Liger replaces. Not its losses: sftx's head weights tokens, and Liger's reads a count back to the host."""
LOSSES = {"cross_entropy": False, "fused_linear_cross_entropy": False}


def liger_unusable(model: Any, device: torch.device) -> str | None:
    """Return why Liger's kernels cannot be used for this model here, or None."""
    if device.type != "cuda":
        return "they need an NVIDIA GPU"
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError:
        return MISSING
    kind = model.config.model_type
    return None if kind in MODEL_TYPE_TO_APPLY_LIGER_FN else f"liger-kernel has none for model_type {kind}"


def apply_liger(model: Any) -> None:
    """Let a model use Liger's kernels; this cannot be undone."""
    from transformers.integrations.liger import apply_liger_kernel

    apply_liger_kernel(model, PARTS | LOSSES)
