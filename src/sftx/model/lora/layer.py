"""sftx's LoRA layers, put in by PEFT's dispatch; files, configuration, merging and everything else are PEFT's."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import nn

from sftx.model.lora.dropout import KeyedDropout
from sftx.model.lora.function import Update, lora_linear
from sftx.model.lora.routing import Routing, Span


class RoutedLora:
    """The forward pass of a LoRA layer: one adapter, or the adapter of each span of tokens."""

    routing: Routing | None = None

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the layer's output; PEFT's own where the adapters are off, merged, several at once or not plain."""
        spans = self._spans(x.shape[:-1].numel())
        if args or kwargs or spans is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        return routed_forward(self, x, spans)

    def _spans(self: Any, tokens: int) -> tuple[Span, ...] | None:
        """Return the spans that this layer adapts; None where PEFT's forward pass is needed."""
        if self.disable_adapters or self.merged:
            return None
        if self.routing is not None and self.routing.spans:
            return tuple(span for span in self.routing.spans if span.adapter in self.lora_A)
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) != 1 or active[0] in self.lora_variant:
            return None
        return (Span(0, tokens, active[0]),)


def routed_forward(layer: Any, x: torch.Tensor, spans: tuple[Span, ...]) -> torch.Tensor:
    """Return the output of a layer whose spans of tokens use an adapter each."""
    x_TI = x.reshape(-1, x.shape[-1])
    updates = []
    for start, stop, name in spans:
        scale, keep, dropout = layer.scaling[name], None, layer.lora_dropout[name]
        if isinstance(dropout, KeyedDropout) and dropout.drops:
            keep, kept = dropout.keep(x_TI[start:stop])
            scale = scale / kept
        updates.append(Update(start, stop, scale, keep, layer.lora_A[name].weight, layer.lora_B[name].weight))
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    out_TO = lora_linear(x_TI, layer.base_layer, updates, dtype)
    return out_TO.view(*x.shape[:-1], out_TO.shape[-1])


class LoraLinear(RoutedLora, PeftLinear):
    """A LoRA layer on `nn.Linear`."""

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the layer's output; TorchInductor fuses PEFT's own better."""
        if torch.compiler.is_compiling():
            return PeftLinear.forward(self, x, *args, **kwargs)
        return RoutedLora.forward(self, x, *args, **kwargs)


def custom_modules(model: Any) -> dict[type[nn.Module], type[nn.Module]]:
    """Return sftx's LoRA layer for each kind of linear layer, for PEFT's dispatch; none if otherwise quantized."""
    quantized = getattr(model.config, "quantization_config", None)
    if quantized is None:
        return {nn.Linear: LoraLinear}
    if not getattr(quantized, "load_in_4bit", False):
        return {}
    from bitsandbytes.nn import Linear4bit

    from sftx.model.lora.layer_4bit import LoraLinear4bit

    return {Linear4bit: LoraLinear4bit, nn.Linear: LoraLinear}  # in this order: the one is a subclass of the other
