"""What a user reads before the first step and after the last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from sftx import __version__
from sftx.config.derive import propose_length
from sftx.effective import Effective

WIDTH = 110


def as_text(renderable: Any) -> str:
    """Render without colour, for the log file and a pipe."""
    console = Console(width=WIDTH, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get().rstrip("\n")


def header(title: str, facts: Sequence[tuple[str, str]], effective: Effective) -> Panel:
    """Return the panel at the start of a run: its facts, then every fallback and remark."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, Text(value))
    for fallback in effective.fallbacks:
        table.add_row(Text("fallback", style="yellow"), Text(str(fallback)))
    for remark in effective.remarks:
        table.add_row(Text("note", style="yellow"), Text(remark))
    return Panel(table, title=f"sftx {__version__} · {title}", title_align="left", width=WIDTH)


def length_line(lengths: Sequence[int], limit: int) -> str:
    """Say how long the rows are, how many `max_seq_length` covers, and what would do."""
    ordered = sorted(lengths)
    at = {p: ordered[min(len(ordered) - 1, int(p / 100 * len(ordered)))] for p in (50, 90, 99)}
    covered = sum(n <= limit for n in lengths) / len(lengths)
    return (
        f"tokens per row: median {at[50]}, p90 {at[90]}, p99 {at[99]}, max {ordered[-1]}; "
        f"max_seq_length={limit} covers {covered:.1%} (proposed: {propose_length(lengths)})"
    )


def count(number: int) -> str:
    """Write a number of parameters: 2.4 M."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
