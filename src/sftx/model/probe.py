"""What a model can do is probed, not assumed: which kernels it can use, and whether it keeps documents apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch

from sftx.errors import ModelError, is_out_of_memory
from sftx.model.adapt import AdaptedModel
from sftx.model.kernels.attention import VARLEN, padding_free_inputs, register, varlen_unusable
from sftx.model.kernels.cross_entropy import kernel_unusable
from sftx.model.kernels.liger import apply_liger, liger_unusable

BEFORE, DOCUMENT = [7, 3, 11, 5, 9], [2, 8, 4, 10, 6, 12]
"""Two short documents of token ids that every vocabulary has."""
OTHER_ARGUMENTS = (TypeError, ValueError, RuntimeError, AttributeError)
"""What an architecture raises that is called in another way."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Of the largest logit: what two orders of summation may differ by."""
TRITON, LIGER = "cross entropy", "Liger"


class Numerics(Protocol):
    """The number format of the forward pass."""

    @property
    def dtype(self) -> torch.dtype:
        """The format."""

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context of a forward pass."""


@dataclass
class Probed:
    """What was found out before the first step."""

    kernels: list[str] = field(default_factory=list)
    """Those in use; stored in the manifest and used again when the run is resumed."""
    unusable: dict[str, str] = field(default_factory=dict)
    """Kernels that are not in use, each with its reason."""
    documents_leak: str | None = None
    """Why padding-free documents influence each other, None: they do not."""


class ModelProbe:
    """Forward passes of a short document, whose logits are computed once."""

    def __init__(self, model: AdaptedModel, numerics: Numerics, device: torch.device) -> None:
        self.model = model
        self._numerics, self._device = numerics, device

    @cached_property
    def logits(self) -> torch.Tensor:
        """The document's logits `[1, T, V]`."""
        return self.forward(DOCUMENT)

    def forward(self, ids: Sequence[int], *, through_head: bool = False, **arguments: Any) -> torch.Tensor:
        """Return the logits as in evaluation, `[1, T, V]`; `through_head`: the head's output for the hidden states."""
        was_training = self.model.module.training
        self.model.module.eval()
        try:
            with torch.no_grad(), self._numerics.autocast():
                ids_1T = torch.tensor([ids], device=self._device)
                out = self.model(input_ids=ids_1T, use_cache=False, through_head=through_head, **arguments)
                logits: torch.Tensor = out if through_head else out.logits
                return logits
        finally:
            self.model.module.train(was_training)

    def difference(self, found: torch.Tensor, wanted: torch.Tensor) -> float | None:
        """Return by how much logits differ, if it is more than another order of summation explains."""
        largest = (found.float() - wanted.float()).abs().max().item()
        allowed = TOLERANCE[self._numerics.dtype] * max(1.0, wanted.float().abs().max().item())
        return None if largest <= allowed else largest

    def head_gives_logits(self) -> bool:
        """Return True if the logits are what the head makes of the decoder's output, so that the loss can be, too.

        Some architectures cap or scale them (Gemma 2, Cohere, Granite); their losses are computed from logits.
        """
        if self.model.network.loss_head is None:
            return False
        try:
            found = self.forward(DOCUMENT, through_head=True)
        except OTHER_ARGUMENTS as error:
            if is_out_of_memory(error):
                raise
            return False
        return torch.equal(found.float(), self.logits.float())

    def documents_leak(self) -> str | None:
        """Return why a second document's logits are not those that it has alone, or None when they are."""
        lengths = (len(BEFORE), len(DOCUMENT))
        positions = torch.tensor([[*range(lengths[0]), *range(lengths[1])]], device=self._device)
        try:
            alone = self.logits
            both = self.forward([*BEFORE, *DOCUMENT], **padding_free_inputs(positions, lengths))
        except OTHER_ARGUMENTS as error:
            if is_out_of_memory(error):
                raise
            return (str(error).splitlines() or [type(error).__name__])[0]
        difference = self.difference(both[:, lengths[0] :], alone)
        return None if difference is None else f"a row's logits change by {difference:.2g} beside another row"


def probe(
    model: AdaptedModel,
    numerics: Numerics,
    device: torch.device,
    *,
    padding_free: bool,
    kernels: Sequence[str],
    pinned: Sequence[str] | None,
    from_main: Callable[[Any], Any],
) -> Probed:
    """Choose the kernels among `kernels` that compute what they replace, and let the model use them.

    `pinned` are those of the run's first attempt: another choice would round differently. The main rank decides for
    all ranks, by `from_main`.

    Raises:
        ModelError: a rank lacks a kernel that the main rank uses, or one changes the model.
    """
    checks: dict[str, Callable[[], str | None]] = {
        VARLEN: lambda: varlen_unusable(model.module.config, device, numerics.dtype),
        TRITON: lambda: kernel_unusable(device, numerics.dtype),
        LIGER: lambda: liger_unusable(model.module, device),
    }
    unusable = {name: reason for name in kernels if (reason := checks[name]()) is not None}
    wanted = [name for name in kernels if pinned is None or name in pinned]
    chosen: list[str] = from_main([name for name in wanted if name not in unusable])
    for name in chosen:
        if name in unusable:
            raise ModelError(f"the main rank uses the kernel for {name}, but this rank cannot: {unusable[name]}.")
    for name in kernels:
        if name not in chosen:
            unusable.setdefault(name, "the run began without it")
    _use(chosen, model, ModelProbe(model, numerics, device))
    after = ModelProbe(model, numerics, device)
    model.computes_losses = after.head_gives_logits()
    return Probed(chosen, unusable, after.documents_leak() if padding_free else None)


def _use(kernels: Sequence[str], model: AdaptedModel, before: ModelProbe) -> None:
    if LIGER in kernels:
        wanted = before.logits
        apply_liger(model.module)
        if difference := before.difference(before.forward(DOCUMENT), wanted):
            raise ModelError(
                f"Liger's kernels change this model's logits by {difference:.2g}. Train without them: "
                f"pip uninstall liger-kernel."
            )
    if VARLEN in kernels:
        model.base.set_attn_implementation(register(VARLEN))
    if model.network.loss_head is not None:
        model.network.loss_head.triton = TRITON in kernels
