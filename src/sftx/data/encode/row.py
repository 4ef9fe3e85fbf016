"""Rows: records as tokens, with what each token weighs in the loss."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Row:
    """One record as tokens: `ids_T` int32, `weights_T` float32 (0 where a token is not supervised, usually 1)."""

    ids_T: np.ndarray
    weights_T: np.ndarray
    category: str
    origin: str
    """`file:line` of the record."""
    full_length: int
    """Tokens before truncation."""

    @property
    def truncated(self) -> bool:
        """True when tokens were cut off."""
        return self.full_length > len(self.ids_T)

    @property
    def supervised_T(self) -> np.ndarray:  # noqa: N802 - a shape suffix
        """Bool: true where a token is supervised."""
        return self.weights_T > 0

    @property
    def supervised_tokens(self) -> int:
        """Tokens that carry loss; the first token of a sequence never does, nothing predicts it."""
        return int(self.supervised_T[1:].sum())

    @property
    def loss_weight(self) -> float:
        """The sum of the weights of the tokens that carry loss."""
        return float(self.weights_T[1:].sum(dtype=np.float64))
