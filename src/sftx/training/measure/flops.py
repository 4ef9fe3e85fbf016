"""The floating-point operations that a step has to make: what MFU is a share of.

Counted as in PaLM (arXiv:2204.02311, appendix B), with what fine-tuning leaves out: no weight gradient of a frozen
weight, the head on supervised positions only, attention on the lower triangle of each document. Recomputation is not
counted. The input gradient of the first block's projections, which a frozen embedding has no use for, is: under 1 %.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from sftx.model.adapt import AdaptedModel

FROZEN, TRAINED = 2, 3
"""Products of a layer: forward, gradient of the input, gradient of the weight."""
ATTENTION = 2 + 5
"""Products of a document's attention: two forward, five back."""


@dataclass(frozen=True)
class Linear:
    """A layer that multiplies its rows by a matrix `inner x outer`, `passes` times."""

    inner: int
    outer: int
    passes: int

    def flops(self, rows: int) -> int:
        """Return the operations on so many rows."""
        return 2 * self.passes * rows * self.inner * self.outer


@dataclass(frozen=True)
class Work:
    """What a model does for each token, for each supervised token, and for each document."""

    layers: tuple[Linear, ...]
    head: Linear
    attention_width: int
    """Heads times their width, over all blocks."""

    def flops(self, lengths: Iterable[int], supervised: int) -> int:
        """Return the operations of forward and backward pass over documents of these lengths."""
        lengths = list(lengths)
        rows = sum(lengths)
        # Of a product `[length, width] [width, length]`, half of which is seen by a causal model.
        attention = sum(ATTENTION * length * (length + 1) * self.attention_width for length in lengths)
        return sum(layer.flops(rows) for layer in self.layers) + self.head.flops(supervised) + attention


def work_of(model: AdaptedModel) -> Work | None:
    """Count a model's layers; None where its experts, its head or its attention cannot be read from them."""
    head = model.module.get_output_embeddings()
    config = model.module.config.get_text_config()
    if not isinstance(head, nn.Linear) or getattr(config, "num_experts", None) or "moe" in str(config.model_type):
        return None
    if not getattr(config, "num_attention_heads", None):  # Mamba-2
        return None
    layers = [_linear(m) for m in model.module.modules() if isinstance(m, nn.Linear) and m is not head]
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    blocks = config.num_hidden_layers * config.num_attention_heads * width
    return Work(tuple(layers), _linear(head), blocks)


def _linear(layer: Any) -> Linear:
    return Linear(layer.in_features, layer.out_features, TRAINED if layer.weight.requires_grad else FROZEN)
