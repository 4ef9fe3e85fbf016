"""What a model can do is tried, not assumed: it keeps rows apart; its head's output is its logits; its last block
need not compute what is not wanted."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import nn

from sftx.model.adapt import AdaptedModel
from sftx.model.attention import end_to_end
from sftx.model.head import LossHead
from sftx.model.lora.targets import decoder_layers
from sftx.model.shortcuts import KEPT, shorten
from sftx.training.memory import is_out_of_memory
from sftx.training.precision import Numerics

BEFORE, DOCUMENT = [7, 3, 11, 5, 9], [2, 8, 4, 10, 6, 12]
"""Two short documents of token ids that every vocabulary has."""
OTHER_ARGUMENTS = (TypeError, ValueError, RuntimeError, AttributeError)
"""What an architecture raises that is called in another way."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Of the largest logit: what two orders of summation may differ by."""


class Tried:
    """What a model does with a short document, which is asked once for all that is to be found out."""

    def __init__(self, model: AdaptedModel, numerics: Numerics, device: torch.device) -> None:
        self.model = model
        self._numerics, self._device = numerics, device
        layer = model.module.get_output_embeddings()
        self._head = LossHead(layer) if type(layer) is nn.Linear else None
        self._of_head: list[torch.Tensor] = []

    @cached_property
    def logits(self) -> torch.Tensor:
        """The document's logits `[1, T, V]`, the head's own output beside them."""
        with self._head.asked(self._note) if self._head else nullcontext():
            return self.forward(DOCUMENT)

    def forward(self, ids: Sequence[int], **arguments: Any) -> torch.Tensor:
        """Return the logits as in evaluation, `[1, T, V]`."""
        was_training = self.model.module.training
        self.model.module.eval()
        try:
            with torch.no_grad(), self._numerics.autocast():
                ids_1T = torch.tensor([ids], device=self._device)
                logits: torch.Tensor = self.model(input_ids=ids_1T, use_cache=False, **arguments).logits
                return logits
        finally:
            self.model.module.train(was_training)

    def tensor(self, values: Sequence[int]) -> torch.Tensor:
        """Return whole numbers where the model is."""
        return torch.tensor(values, device=self._device)

    def differ(self, found: torch.Tensor, wanted: torch.Tensor) -> float | None:
        """Return by how much logits differ, if it is more than another order of summation explains."""
        difference = (found.float() - wanted.float()).abs().max().item()
        allowed = TOLERANCE[self._numerics.dtype] * max(1.0, wanted.float().abs().max().item())
        return None if difference <= allowed else difference

    def loss_head(self) -> LossHead | None:
        """Return the model's head that can answer with losses; None where its output is not the model's logits.

        Some architectures cap or scale what the head returns (Gemma 2, Cohere, Granite); they keep the plain way.
        """
        if self._head is None:
            return None
        logits = self.logits
        if len(self._of_head) == 1 and torch.equal(self._of_head[0].float(), logits.float()):
            return self._head
        self._head.remove()
        return None

    def _note(self, logits: torch.Tensor) -> torch.Tensor:
        self._of_head.append(logits)
        return logits


def documents_leak(tried: Tried) -> str | None:
    """Return why a second document's logits are not those that it has alone, or None when they are."""
    lengths = (len(BEFORE), len(DOCUMENT))
    positions = tried.tensor([*range(lengths[0]), *range(lengths[1])])[None]
    try:
        alone = tried.logits
        both = tried.forward([*BEFORE, *DOCUMENT], **end_to_end(positions, lengths))
    except OTHER_ARGUMENTS as error:
        if is_out_of_memory(error):
            raise
        return (str(error).splitlines() or [type(error).__name__])[0]
    difference = tried.differ(both[:, lengths[0] :], alone)
    return None if difference is None else f"a row's logits change by {difference:.2g} beside another row"


def last_block_shortened(tried: Tried) -> bool:
    """Let the model's last block leave out positions without a target, if its logits stay the same; tell whether."""
    blocks = decoder_layers(tried.model.module)
    undo = shorten(blocks[-1]) if blocks else None
    if undo is None:
        return False
    kept = tried.tensor([1, 4])
    try:
        whole = tried.logits[:, kept]
        short = tried.forward(DOCUMENT, **{KEPT: kept})
    except OTHER_ARGUMENTS as error:
        undo()
        if is_out_of_memory(error):
            raise
        return False
    if whole.shape == short.shape and tried.differ(short, whole) is None:
        return True
    undo()
    return False
