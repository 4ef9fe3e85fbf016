"""Evaluation: the loss on held-out rows, over all tokens and by category."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sftx.data.loader import collate
from sftx.data.rows import Row
from sftx.model.adapt import AdaptedModel
from sftx.parallel.engine import Engine
from sftx.training.loss import token_losses
from sftx.training.precision import Numerics


@dataclass(frozen=True)
class Evaluation:
    """Token-weighted losses: a token counts the same in whichever row it stands."""

    loss: float
    by_category: dict[str, float]
    tokens: int
    seconds: float

    def metrics(self) -> dict[str, float]:
        """Return the evaluation under its metric names."""
        named = {f"eval/loss/{c}": v for c, v in self.by_category.items()}
        return {"eval/loss": self.loss, **named, "eval/supervised_tokens": self.tokens, "eval/seconds": self.seconds}


def groups_by_length(rows: Sequence[Row], token_budget: int) -> list[tuple[int, ...]]:
    """Group rows of like length so that a padded batch holds at most `token_budget` slots, or one row."""
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].ids_T), i))
    groups: list[tuple[int, ...]] = []
    at = 0
    while at < len(order):
        count = max(1, token_budget // len(rows[order[at]].ids_T))
        groups.append(tuple(order[at : at + count]))
        at += count
    return groups


@torch.no_grad()
def evaluate(
    engine: Engine, model: AdaptedModel, numerics: Numerics, rows: Sequence[Row], *, token_budget: int, pad_id: int
) -> Evaluation:
    """Return the loss of the active adapter on `rows`; the ranks share the work.

    `token_budget` bounds a batch: training's own micro-batch size, so that evaluation never needs more.
    """
    started = time.perf_counter()
    categories = sorted({r.category for r in rows})
    number = {c: i for i, c in enumerate(categories)}
    sums_C2 = torch.zeros(len(categories), 2, dtype=torch.float64, device=engine.device)
    model.module.eval()
    groups = groups_by_length(rows, token_budget)
    if engine.sharded:  # every rank must take part in every forward pass
        groups += [()] * (-len(groups) % engine.world_size)
    for indices in groups[engine.rank :: engine.world_size]:
        batch = collate(rows, indices, pad_id)
        with numerics.autocast():
            losses_N, rows_N = token_losses(model, batch, engine.device)
        place_B = torch.tensor([number[rows[i].category] for i in indices], device=engine.device)
        place_N = place_B[rows_N]
        sums_C2[:, 0].index_add_(0, place_N, losses_N.double())
        sums_C2[:, 1].index_add_(0, place_N, torch.ones_like(losses_N, dtype=torch.float64))
    model.module.train()
    sums = engine.sum(sums_C2).cpu()
    total, tokens = sums.sum(dim=0).tolist()
    by_category = {c: (sums[i, 0] / sums[i, 1]).item() for c, i in number.items() if sums[i, 1] > 0}
    return Evaluation(total / max(tokens, 1), by_category, int(tokens), time.perf_counter() - started)
