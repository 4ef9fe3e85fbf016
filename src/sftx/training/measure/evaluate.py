"""Evaluation: the loss on held-out rows, over all tokens and by category."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from sftx.data.batches.collate import collate
from sftx.data.store.rows import Rows
from sftx.model.adapt import AdaptedModel
from sftx.parallel.engine import Engine
from sftx.tensors import to_device
from sftx.training.loss import token_losses
from sftx.training.precision import Numerics


@dataclass(frozen=True)
class Evaluation:
    """Token-weighted losses: each token counts by its weight."""

    loss: float
    by_category: dict[str, float]
    tokens: int
    seconds: float

    def metrics(self) -> dict[str, float]:
        """Return the evaluation under its metric names."""
        named = {f"eval/loss/{c}": v for c, v in self.by_category.items()}
        return {"eval/loss": self.loss, **named, "eval/supervised_tokens": self.tokens, "eval/seconds": self.seconds}


def groups_by_length(lengths: Sequence[int], token_budget: int, *, padding_free: bool) -> list[tuple[int, ...]]:
    """Group rows of like length so that a batch holds at most `token_budget` slots, padding included, or one row."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    groups: list[tuple[int, ...]] = []
    group: list[int] = []
    used = 0
    for i in order:
        slots = int(lengths[i] if padding_free or not group else lengths[group[0]])
        if group and used + slots > token_budget:
            groups.append(tuple(group))
            group, used = [], 0
            slots = int(lengths[i])
        group.append(i)
        used += slots
    return [*groups, tuple(group)] if group else groups


@torch.no_grad()
def evaluate(
    engine: Engine,
    model: AdaptedModel,
    numerics: Numerics,
    rows: Rows,
    *,
    token_budget: int,
    padding_free: bool,
    pad_id: int,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Return the loss of the active adapter on `rows`, or None if a rank was stopped; the ranks share the work.

    `token_budget` bounds a batch: training's own micro-batch size, so that evaluation never needs more.
    """
    started = time.perf_counter()
    of_row = [r.category for r in rows]
    categories = sorted(set(of_row))
    number = {c: i for i, c in enumerate(categories)}
    sums_C3 = torch.zeros(len(categories), 3, dtype=torch.float64, device=engine.device)
    model.module.eval()
    groups = groups_by_length(rows.lengths.tolist(), token_budget, padding_free=padding_free)
    if engine.sharded:  # every rank must take part in every forward pass
        groups += [()] * (-len(groups) % engine.world_size)
    for indices in groups[engine.rank :: engine.world_size]:
        ends = stop_requested()  # a flag of the host, which does not wait for the device unless the ranks must agree
        if engine.sum(torch.tensor(float(ends), device=engine.device)).item() if engine.sharded else ends:
            break
        batch = collate(rows, indices, padding_free=padding_free, pad_id=pad_id)
        with numerics.autocast():
            found = token_losses(model, batch, engine.device)
        category_B = to_device(torch.tensor([number[of_row[i]] for i in indices] or [0]), engine.device)
        weights_N = found.weights_N.double()
        sums_N3 = torch.stack([found.losses_N.double() * weights_N, weights_N, torch.ones_like(weights_N)], dim=1)
        sums_C3.index_add_(0, category_B[found.places_N], sums_N3)
    model.module.train()
    if engine.sum(torch.tensor(float(stop_requested()), device=engine.device)).item():
        return None
    sums = engine.sum(sums_C3).cpu()
    loss, weight, tokens = sums.sum(dim=0).tolist()
    by_category = {c: (sums[i, 0] / sums[i, 1]).item() for c, i in number.items() if sums[i, 1] > 0}
    return Evaluation(loss / (weight or 1.0), by_category, int(tokens), time.perf_counter() - started)
