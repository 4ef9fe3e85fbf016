"""Check the points of a sweep before the first of them runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import islice, product
from typing import Any

from hydra.core.override_parser.types import IntervalSweep
from omegaconf import DictConfig

from sftx.config.checks.check import Tree, check_knob, check_resolved
from sftx.config.checks.rules import RULES, broken_rules
from sftx.config.checks.unused import Uses
from sftx.config.options import ALL_GROUPS
from sftx.config.schema import KNOBS
from sftx.config.trees import replaced
from sftx.config.values import Origin, Sweep, show

Axes = dict[str, tuple[Any, ...]]
Point = dict[str, Any]
MOST_COMPOSED = 40
"""Combinations of options that are composed; beyond that, each option once beside the others' first."""
MOST_COMBINED = 20_000
"""Combinations of values that are tried against the rules."""


def is_sweep(value: Any) -> bool:
    """Return True for a value that is several."""
    return isinstance(value, Sweep | IntervalSweep)


def values_of(value: Any) -> tuple[Any, ...]:
    """Return the values of an axis; of an interval, its ends."""
    if isinstance(value, IntervalSweep):
        return tuple(int(v) if v is not None and v == int(v) else v for v in (value.start, value.end))
    return tuple(value.values)


def first_point(axes: Axes) -> Point:
    """Return the first value of each axis."""
    return {k: v[0] for k, v in axes.items()}


def check_space(axes: Axes, compose: Callable[[Point], DictConfig | None], origin: Origin, uses: Uses) -> list[str]:
    """Return every problem of every point: wrong values at any position, and combinations that cannot be.

    `uses` sees every point.

    `compose` returns the configuration at a point. Axes of options, and those whose values name other
    keys, are composed; plain values are put into the composed tree, which is a thousand times faster.
    """
    composed = {k: v for k, v in axes.items() if k in ALL_GROUPS or "${" in str(v)}
    plain = {k: v for k, v in axes.items() if k not in composed}
    problems: list[str] = []
    broken: dict[tuple[str, str], list[str]] = {}
    for number, point in enumerate(_points(composed)):
        cfg = compose(point | first_point(plain))
        if cfg is None:
            continue
        tree = Tree(cfg, origin)
        problems += check_resolved(tree, origin, rules=False)
        problems += _check_values(tree, plain, origin, nested_only=number > 0)
        for place, text, at in _broken(tree, point, plain, origin):
            broken.setdefault((place, text), []).append(at)
        uses.look(tree, point, plain)
    for (place, text), points in broken.items():
        more = f" and {len(points) - 1} more" if len(points) > 1 else ""
        problems.append(f"{place}: {text}" + (f" So it is at {points[0]}{more}." if points[0] else ""))
    return list(dict.fromkeys(problems + uses.problems()))


def _points(axes: Axes) -> Iterator[Point]:
    count = 1
    for values in axes.values():
        count *= len(values)
    if count <= MOST_COMPOSED:
        yield from (dict(zip(axes, values, strict=True)) for values in product(*axes.values()))
        return
    yield first_point(axes)
    for key, values in axes.items():
        for value in values[1:]:
            yield first_point(axes) | {key: value}


def _check_values(tree: Tree, axes: Axes, origin: Origin, *, nested_only: bool) -> list[str]:
    """Check each further value of each axis by itself; the first ones are in the tree."""
    problems = []
    for key, values in axes.items():
        for value in values[1:]:
            if key in KNOBS:
                problems += [] if nested_only else check_knob(key, value, origin)
            elif "." in key:
                problems += check_resolved(_with(tree, key, value), origin, rules=False)
    return problems


def _with(tree: Tree, key: str, value: Any) -> Tree:
    """Return a copy of the tree with one nested value replaced, and without its own problems."""
    out = copy.copy(tree)
    out.problems = []
    out.raw, out.values = (replaced(part, {key: value}) for part in (tree.raw, tree.values))
    return out


def _broken(tree: Tree, options: Point, axes: Axes, origin: Origin) -> Iterator[tuple[str, str, str]]:
    """Try the rules on every combination of the values that they look at; yield place, problem and point."""
    ruled = {key for rule in RULES for key in rule.keys if key in KNOBS}
    right = {k: [v for v in values if not check_knob(k, v, origin)] for k, values in axes.items() if k in ruled}
    relevant = {k: values for k, values in right.items() if values}
    wrong = tree.wrong - relevant.keys()
    for values in islice(product(*relevant.values()), MOST_COMBINED):
        point = dict(zip(relevant, values, strict=True))
        for rule, text in broken_rules(tree.values | point, wrong):
            swept = {k: v for k, v in (options | point).items() if k in rule.keys or k in ALL_GROUPS}
            place = origin(next((k for k in rule.keys if k in point), rule.keys[0]))
            yield place, text, " ".join(f"{k}={show(v)}" for k, v in swept.items())
