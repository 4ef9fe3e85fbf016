"""The settings of group `mode`: all parameters, LoRA, or LoRA on a 4-bit base.

torch and PEFT are imported when a model is built, not when its settings are checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from sftx.config.bounds import Bounds

if TYPE_CHECKING:
    import torch

    from sftx.model.lora.targets import Targets


@dataclass(frozen=True)
class Full:
    """All parameters are trained, held in fp32."""

    adapts = False

    def quantization(self, compute_dtype: torch.dtype) -> Any:
        """Return None: full mode trains unquantized weights."""
        return None

    def weights_dtype(self, compute_dtype: torch.dtype) -> torch.dtype:
        """Return fp32: an optimizer's small updates are lost in half precision."""
        import torch

        return torch.float32


@dataclass(frozen=True)
class Lora:
    """A frozen base with a low-rank update `alpha / rank * B A` on its linear layers (arXiv:2106.09685)."""

    rank: Annotated[int, Bounds(at_least=1)]
    alpha: Annotated[int | float, Bounds(above=0)]
    dropout: Annotated[float, Bounds(at_least=0, below=1)]
    use_rslora: bool = False
    target_modules: str | list[str] = "all-linear"

    adapts = True

    def quantization(self, compute_dtype: torch.dtype) -> Any:
        """Return None: the base keeps its number format."""
        return None

    def weights_dtype(self, compute_dtype: torch.dtype) -> torch.dtype:
        """Return the base's number format."""
        return compute_dtype

    def peft_config(self, targets: Targets) -> Any:
        """Return PEFT's configuration of this adapter."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=0.0 if targets.parameters else self.dropout,  # PEFT has none for parameters
            use_rslora=self.use_rslora,
            target_modules=targets.modules,
            target_parameters=targets.parameters or None,
            bias="none",
            task_type="CAUSAL_LM",
        )


@dataclass(frozen=True)
class QLora(Lora):
    """LoRA on a base held in 4 bits (arXiv:2305.14314)."""

    quant_type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = True

    def quantization(self, compute_dtype: torch.dtype) -> Any:
        """Return transformers' quantization of the base: 4 bits, computing in `compute_dtype`."""
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=compute_dtype,
        )
