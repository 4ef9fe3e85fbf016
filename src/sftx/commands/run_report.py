"""Two runs side by side, for a terminal."""

from __future__ import annotations

import json
import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from sftx.runs.compare import Difference, Section
from sftx.runs.compare_metrics import Change, Metric, eval_loss
from sftx.runs.past import PastRun
from sftx.terminal import counted, differing, visible

WIDTH = 100
"""Of what is not printed on a terminal."""
LONG = 240
"""Letters of a value that are shown at most: those around the first that differs."""


def headings(name: str, run: PastRun) -> Iterator[str]:
    """Name a run, how it ended, how far it came, and which of its files cannot be read."""
    started = str(run.fact("environment", "started") or "")[:19].replace("T", " ")
    steps = counted(run.last_step, "step")
    told = [run.status, steps, *([f"started {started}"] if started else [])]
    yield visible(f"{name}  {run.path}  ({', '.join(told)})")
    for problem in run.problems.values():
        yield from folded(f"   {visible(problem)}", indent=5)


def section_lines(section: Section, a: PastRun, b: PastRun) -> Iterator[str]:
    """Yield the lines of one section; of one without differences, a single line."""
    counted = [d for d in section.differences if d.counts]
    shown = [d for d in section.differences if d.counts or d.key != "output_dir"]  # which the headings say
    if section.unknown:
        yield f"{section.name}: not compared, see above"
        return
    if section.name == "metrics":
        yield from _metric_lines(section.metrics, a, b)
        return
    many = f"{len(counted)} difference{'s' if len(counted) > 1 else ''}" if counted else "no difference"
    yield f"{section.name}: {many}"
    for d in shown:
        yield from difference_lines(d)


def difference_lines(d: Difference, words: tuple[str, str] = ("a", "b")) -> Iterator[str]:
    """Yield `key: was -> is` on one line, or each value on its own when they are long."""
    a, b = _pair(d.a, d.b)
    head = f"{visible(d.key)}:"
    tail = "" if d.counts else "  (does not count)"
    line = f"  {head} {a} -> {b}{tail}"
    if len(line) <= width():
        yield line
        return
    yield f"  {head}{tail}"
    for word, value in zip(words, (a, b), strict=True):
        yield from folded(f"    {word}  {value}", indent=5 + len(word) + 1)


def _pair(a: Any, b: Any) -> tuple[str, str]:
    """Write two values; of long ones the part where they begin to differ."""
    one, other = differing(written(a), written(b), most=LONG)
    return visible(one), visible(other)


def written(value: Any) -> str:
    """Write a value: a text as it is, everything else as JSON."""
    if isinstance(value, str):
        return value or '""'
    return json.dumps(value, ensure_ascii=False, default=str)


def _metric_lines(metrics: Sequence[Metric], a: PastRun, b: PastRun) -> Iterator[str]:
    apart = [m for m in metrics if m.differs]
    steps = f"{counted(len(a.records.keys() & b.records.keys()), 'step')} that both recorded"
    if not metrics:
        yield "metrics: none recorded"
        return
    if apart:
        yield f"metrics: {len(apart)} of {len(metrics)} differ (speed left out; {steps})"
        yield from table([_TITLES, *map(_row, apart)])
    else:
        yield f"metrics: no difference ({len(metrics)} of them, speed left out; {steps})"
    for word, run in (("a", a), ("b", b)):
        found = eval_loss(run)
        if found:
            told = (("first", found.first), ("best", found.best), ("last", found.last))
            yield f"  eval loss of {word}: " + ", ".join(
                f"{name} {loss:.4f} (step {step})" for name, (step, loss) in told
            )


_TITLES = ("metric", "steps a, b", "first difference", "largest")


def _row(metric: Metric) -> tuple[str, ...]:
    steps = f"{metric.steps_a}, {metric.steps_b}"
    if metric.first is None:
        return visible(metric.name), steps, f"none in {metric.shared} shared steps", ""
    return visible(metric.name), steps, change_words(metric.first), f"{metric.largest:.3g} (step {metric.largest_step})"


def change_words(change: Change) -> str:
    """Say what a metric was and is at a step, in as many digits as the difference needs."""
    a, b = (visible(f"{v:.9g}" if isinstance(v, float) else written(v)) for v in (change.a, change.b))
    if a == b:
        a, b = repr(change.a), repr(change.b)
    return f"step {change.step}: {a} -> {b}"


def table(rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield rows in columns."""
    cells = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        yield "  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()


def folded(text: str, indent: int) -> list[str]:
    """Fold a line between words; what is one word, such as a path, stays one."""
    lead = re.match(r" *", text)
    assert lead is not None
    return textwrap.wrap(
        text.strip(),
        width(),
        initial_indent=lead[0],
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def width() -> int:
    """Return how wide a line may be."""
    return max(40, shutil.get_terminal_size((WIDTH, 24)).columns)
