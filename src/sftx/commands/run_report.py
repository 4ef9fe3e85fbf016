"""Two runs side by side, for a terminal."""

from __future__ import annotations

import json
import math
import shutil
import textwrap
from collections.abc import Iterator
from typing import Any

from sftx.runs.saved.comparison import Change, Difference, Section
from sftx.runs.saved.saved_run import Records, SavedRun
from sftx.terminal import columns, counted, differing, visible

WIDTH = 100
"""Of what is not printed on a terminal."""
LONG = 240
"""Characters of a value that are shown at most: those around the first that differs."""


def headings(name: str, run: SavedRun) -> Iterator[str]:
    """Name a run, how it ended, how far it came, and which of its files cannot be read."""
    started = str(run.fact("environment", "started") or "")[:19].replace("T", " ")
    facts = [run.status, counted(run.last_step, "step"), *([f"started {started}"] if started else [])]
    yield visible(f"{name}  {run.path}  ({', '.join(facts)})")
    for problem in run.problems.values():
        yield from folded(f"   {visible(problem)}", indent=5)


def section_lines(section: Section, a: SavedRun, b: SavedRun) -> Iterator[str]:
    """Yield the lines of one section; of one without differences, a single line."""
    if section.unknown:
        yield f"{section.name}: not compared, see above"
    elif section.name == "metrics":
        yield from _metric_lines(section, a.records, b.records)
    else:
        number = sum(d.counts for d in section.differences)
        yield f"{section.name}: {counted(number, 'difference') if number else 'no difference'}"
        for d in section.differences:
            if d.counts or d.key != "output_dir":  # which the headings say
                yield from difference_lines(d)


def difference_lines(d: Difference, words: tuple[str, str] = ("a", "b")) -> Iterator[str]:
    """Yield `key: was -> is` on one line, or each value on its own when they are long."""
    a, b = (visible(text) for text in differing(_written(d.a), _written(d.b), most=LONG))
    head = f"{visible(d.key)}:"
    tail = "" if d.counts else "  (does not count)"
    line = f"  {head} {a} -> {b}{tail}"
    if len(line) <= _width():
        yield line
        return
    yield f"  {head}{tail}"
    for word, value in zip(words, (a, b), strict=True):
        yield from folded(f"    {word}  {value}", indent=5 + len(word) + 1)


def _written(value: Any) -> str:
    """Write a value: a text as it is, everything else as JSON."""
    if isinstance(value, str):
        return value or '""'
    return json.dumps(value, ensure_ascii=False, default=str)


def _metric_lines(section: Section, a: Records, b: Records) -> Iterator[str]:
    metrics, steps = section.metrics, f"{counted(len(a.keys() & b.keys()), 'step')} that both recorded"
    apart = [m for m in metrics if m.differs]
    if not metrics:
        yield "metrics: none recorded"
        return
    if apart:
        yield f"metrics: {len(apart)} of {len(metrics)} differ (speed left out; {steps})"
        rows = [("metric", "steps a, b", "first difference", "largest")]
        for m in apart:
            first = change_words(m.first) if m.first else f"none in {m.shared} shared steps"
            largest = f"{m.largest:.3g} (step {m.largest_step})" if m.first else ""
            rows.append((visible(m.name), f"{m.steps_a}, {m.steps_b}", first, largest))
        yield from (f"  {line}" for line in columns(rows))
    else:
        yield f"metrics: no difference ({len(metrics)} of them, speed left out; {steps})"
    for word, records in (("a", a), ("b", b)):
        found = [(step, r["eval/loss"]) for step, r in sorted(records.items()) if "eval/loss" in r]
        losses = [(step, float(loss)) for step, loss in found if isinstance(loss, int | float)]
        if losses:
            best = min(losses, key=lambda pair: math.inf if math.isnan(pair[1]) else pair[1])
            named = (("first", losses[0]), ("best", best), ("last", losses[-1]))
            yield f"  eval loss of {word}: " + ", ".join(f"{n} {loss:.4f} (step {step})" for n, (step, loss) in named)


def change_words(change: Change) -> str:
    """Say what a metric was and is at a step, in as many digits as the difference needs."""
    a, b = (visible(f"{v:.9g}" if isinstance(v, float) else _written(v)) for v in (change.a, change.b))
    if a == b:
        a, b = repr(change.a), repr(change.b)
    return f"step {change.step}: {a} -> {b}"


def folded(text: str, indent: int) -> list[str]:
    """Fold a line between words; what is one word, such as a path, stays one."""
    lead = " " * (len(text) - len(text.lstrip(" ")))
    return textwrap.wrap(
        text.strip(), _width(), initial_indent=lead, subsequent_indent=" " * indent, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def _width() -> int:
    return max(40, shutil.get_terminal_size((WIDTH, 24)).columns)
