"""The LoRA layer on a base in 4 bits; a module of its own because it needs bitsandbytes."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear4bit as PeftLinear4bit

from sftx.model.lora.layer import RoutedLora


class LoraLinear4bit(RoutedLora, PeftLinear4bit):
    """A LoRA layer on bitsandbytes' `Linear4bit`."""

    @torch.compiler.disable  # compiled code would hold the dequantized weight for the backward pass
    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the layer's output."""
        return RoutedLora.forward(self, x, *args, **kwargs)
