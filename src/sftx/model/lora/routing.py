"""Which adapter each token of a forward pass uses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple


class Span(NamedTuple):
    """The tokens `[start, stop)` of the flattened batch, and the adapter they use."""

    start: int
    stop: int
    adapter: str


@dataclass
class Routing:
    """Shared by all LoRA layers of a model; not a context variable, for recomputation runs in another thread."""

    spans: tuple[Span, ...] = ()
    """Empty: every token uses the active adapter. Tokens in no span get the base's output."""

    @contextmanager
    def over(self, spans: Sequence[Span]) -> Iterator[None]:
        """Route the forward passes inside the block, and their backward passes if activations are recomputed.

        Raises:
            ValueError: two spans overlap.
        """
        ordered = sorted(spans)
        if any(first.stop > second.start for first, second in pairwise(ordered)):
            raise ValueError(f"spans overlap: {ordered}")
        before, self.spans = self.spans, tuple(ordered)
        try:
            yield
        finally:
            self.spans = before
