"""Optimizers, each built for one adapter; group `optimizer`.

Weight decay falls on matrices only, as is usual: not on biases, norms or other vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from sftx.config.bounds import Bounds
from sftx.effective import Effective

if TYPE_CHECKING:  # imported when an optimizer is built, not when its settings are checked
    from torch.nn import Parameter
    from torch.optim import Optimizer

    Parameters = Mapping[str, Parameter]


def groups_of(parameters: Parameters, weight_decay: float) -> list[dict[str, Any]]:
    """Split parameters into those that decay and those that do not; each group keeps its names."""
    decays = {n: p for n, p in parameters.items() if p.ndim >= 2}
    rest = {n: p for n, p in parameters.items() if p.ndim < 2}
    return [
        {"params": list(chosen.values()), "names": list(chosen), "weight_decay": decay}
        for chosen, decay in ((decays, weight_decay), (rest, 0.0))
        if chosen
    ]


def _paged(requested: bool, key: str, effective: Effective) -> bool:
    import torch

    if requested and not torch.cuda.is_available():
        effective.fall_back("optim", key, key.removeprefix("paged_"), "paging needs CUDA")
        return False
    return requested


@dataclass(frozen=True)
class AdamW:
    """AdamW (arXiv:1711.05101): torch's fused one, or bitsandbytes' where state is paged or in 8 bits."""

    bits: Literal[8, 32]
    paged: bool
    betas: Annotated[tuple[float, float], Bounds(at_least=0, below=1)]
    eps: Annotated[float, Bounds(above=0)]
    weight_decay: Annotated[float, Bounds(at_least=0)]

    def build(self, parameters: Parameters, learning_rate: float, effective: Effective) -> Optimizer:
        """Return the optimizer of these parameters."""
        import torch

        groups = groups_of(parameters, self.weight_decay)
        betas = (self.betas[0], self.betas[1])
        name = "paged_adamw_32bit" if self.bits == 32 else "paged_adamw_8bit"
        paged = _paged(self.paged, name, effective)
        if self.bits == 32 and not paged:
            effective.settings["optimizer"] = "torch.optim.AdamW(fused=True)"
            return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=self.eps, fused=True)
        effective.settings["optimizer"] = f"bitsandbytes AdamW, {self.bits} bits, {'paged' if paged else 'not paged'}"
        from bitsandbytes import optim

        kind = optim.AdamW8bit if self.bits == 8 else optim.AdamW32bit
        return kind(groups, lr=learning_rate, betas=betas, eps=self.eps, is_paged=paged)


@dataclass(frozen=True)
class Lion:
    """Lion (arXiv:2302.06675), bitsandbytes' implementation."""

    bits: Literal[8, 32]
    paged: bool
    betas: Annotated[tuple[float, float], Bounds(at_least=0, below=1)]
    weight_decay: Annotated[float, Bounds(at_least=0)]

    def build(self, parameters: Parameters, learning_rate: float, effective: Effective) -> Optimizer:
        """Return the optimizer of these parameters."""
        paged = _paged(self.paged, "paged_lion", effective)
        effective.settings["optimizer"] = f"bitsandbytes Lion, {self.bits} bits"
        from bitsandbytes import optim

        kind = optim.Lion8bit if self.bits == 8 else optim.Lion32bit
        groups = groups_of(parameters, self.weight_decay)
        return kind(groups, lr=learning_rate, betas=(self.betas[0], self.betas[1]), is_paged=paged)


@dataclass(frozen=True)
class Adafactor:
    """Adafactor (arXiv:1804.04235), torch's implementation."""

    beta2_decay: Annotated[float, Bounds(at_most=0)]
    d: Annotated[float, Bounds(at_least=1)]
    weight_decay: Annotated[float, Bounds(at_least=0)]

    def build(self, parameters: Parameters, learning_rate: float, effective: Effective) -> Optimizer:
        """Return the optimizer of these parameters."""
        import torch

        effective.settings["optimizer"] = "torch.optim.Adafactor"
        groups = groups_of(parameters, self.weight_decay)
        return torch.optim.Adafactor(groups, lr=learning_rate, beta2_decay=self.beta2_decay, d=self.d)


@dataclass(frozen=True)
class Sgd:
    """Stochastic gradient descent with momentum."""

    momentum: Annotated[float, Bounds(at_least=0, below=1)]
    nesterov: bool
    weight_decay: Annotated[float, Bounds(at_least=0)]

    def build(self, parameters: Parameters, learning_rate: float, effective: Effective) -> Optimizer:
        """Return the optimizer of these parameters."""
        import torch

        effective.settings["optimizer"] = "torch.optim.SGD"
        groups = groups_of(parameters, self.weight_decay)
        return torch.optim.SGD(groups, lr=learning_rate, momentum=self.momentum, nesterov=self.nesterov)
