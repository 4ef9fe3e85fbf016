"""The report of `sftx data check`: made, shown in a terminal, and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from sftx.build import build
from sftx.config.schema import TrainConfig
from sftx.data.audit import LISTED, Audit, audit
from sftx.data.choose import choose, facts_of
from sftx.data.corpus import Corpus, LoadedFile
from sftx.data.prepare import rows_of
from sftx.data.sources import fetch, find_sources
from sftx.data.store import Rows
from sftx.data.template import ChatTemplate
from sftx.errors import ConfigError
from sftx.files import write_bytes
from sftx.model.family import family_named, family_of
from sftx.model.load import find_model, load_template

BAR = 40
SHOWN_TOKENS = 400
"""Tokens of a row that are shown, at most."""


@dataclass(frozen=True)
class Checked:
    """What was found, and what it was found in."""

    config: TrainConfig
    loaded: LoadedFile
    rows: Rows
    template: ChatTemplate
    audit: Audit
    left_out: list[str]
    """Records that the policies of group `data` leave out, as `file:line: why`."""


def check(files: Sequence[str], held_out: Sequence[str], config: TrainConfig, *, near: float | None) -> Checked:
    """Read, choose and tokenise as a run would.

    Errors:
        SftxError: whatever a run would refuse.
    """
    corpus: Corpus = build(config.data)
    loaded = _load(corpus, files, config)
    held = _load(corpus, held_out, config).records if held_out else ()
    source = find_model(config.model_name_or_path)
    family, _ = family_of(config.model, source.model_type, downloaded=source.downloaded)
    template = load_template(
        source, family, config.template_name, family_named, trust_remote_code=config.trust_remote_code
    )
    facts = facts_of(loaded.records)
    choice = choose(facts, loaded.records, corpus.choose_policy(), config.seed)
    rows, _ = rows_of(loaded, choice.kept, corpus, config, template)
    found = audit(loaded.records, facts, rows, config.max_seq_length, held_out=held, near=near)
    left = [*loaded.skipped(), *(f"{loaded.records.origin(i)}: {why}" for i, why in choice.left_out)]
    return Checked(config, loaded, rows, template, found, left)


def _load(corpus: Corpus, files: Sequence[str], config: TrainConfig) -> LoadedFile:
    sources = [s for f in files for s in find_sources(str(Path(f).parent), Path(f).name or ".", key="FILE")]
    return corpus.read(fetch(sources, key="FILE"), keep_columns=not config.remove_unused_columns)


def show(checked: Checked, *, rows: int, terminal: TextIO) -> None:
    """Print the report."""
    console = Console(file=terminal, highlight=False)
    a = checked.audit
    console.print(_files(checked.loaded))
    console.print(
        f"{a.records:,} records -> {a.rows:,} rows, {a.tokens:,} tokens, {a.supervised_tokens:,} of them learned "
        f"({checked.config.model_name_or_path}, template of {len(checked.template.source)} characters)"
    )
    console.print(_lengths(a))
    console.print(_categories(a))
    for title, places in _findings(checked):
        console.print(Text(f"{title}: {len(places)}", style="yellow" if places else "green"))
        for place in places[:LISTED]:
            console.print(Text(f"  {place}"), soft_wrap=True)
        if len(places) > LISTED:
            console.print(f"  and {len(places) - LISTED} more (--json names all)")
    for index in _typical(checked.rows, rows):
        console.print(_preview(checked, index))


def _findings(checked: Checked) -> list[tuple[str, list[str]]]:
    a = checked.audit
    return [
        ("left out", checked.left_out),
        ("give nothing to learn", a.unlearnable),
        (f"longer than max_seq_length={checked.config.max_seq_length}", a.truncated),
        ("duplicates", a.duplicates),
        *([("near-duplicates", a.near_duplicates)] if a.near_duplicates else []),
        ("same question, other answer", a.conflicts),
        ("held-out questions that are trained on", a.leaks),
    ]


def _files(loaded: LoadedFile) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("file", "format", "encoding", "delimiter", "shape", "rows"):
        table.add_column(name, justify="right" if name == "rows" else "left", overflow="fold")
    for f in loaded.files:
        delimiter = {"\t": "tab", None: "-"}.get(f["delimiter"], f["delimiter"])
        table.add_row(
            *(str(f[k] or "-") for k in ("path", "format", "encoding")), delimiter, f["shape"], f"{f['rows']:,}"
        )
    return table


def _lengths(found: Audit) -> Panel:
    n = found.lengths
    most = max(count for *_, count in n.histogram)
    lines = [
        f"{f'{low}-{high}':>13} {'█' * max(1, round(BAR * count / most)) if count else '':<{BAR}} {count:,}"
        for low, high, count in n.histogram
    ]
    lines.append(f"median {n.median}, 90 % up to {n.p90}, 99 % up to {n.p99}, longest {n.longest}")
    lines.append(
        f"max_seq_length={n.max_seq_length} covers {n.covered:.1%} of the rows; "
        f"proposed: {n.proposed}, which covers {n.proposed_covers:.1%}"
    )
    return Panel("\n".join(lines), title="tokens a row", title_align="left", expand=False)


def _categories(found: Audit) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("category", "records", "tokens", "learned", "languages"):
        table.add_column(name, justify="left" if name in ("category", "languages") else "right", overflow="fold")
    for name, c in found.categories.items():
        languages = ", ".join(f"{k} {v}" for k, v in c.languages.items())
        table.add_row(Text(name), f"{c.rows:,}", f"{c.tokens:,}", f"{c.supervised_tokens:,}", languages)
    return table


def _typical(rows: Rows, count: int) -> list[int]:
    """Return rows of middling length, in the corpus's order."""
    order = np.argsort(rows.full_lengths, kind="stable")
    middle = len(order) // 2
    start = max(0, middle - count // 2)
    return sorted(order[start : start + count].tolist())


def _preview(checked: Checked, index: int) -> Panel:
    """Show a row token by token: green is learned, blue is a control token, a dot a blank at a token's start."""
    row, tokenizer = checked.rows.row(index), checked.template.tokenizer
    control = set(tokenizer.all_special_ids) | set(checked.template.stop_ids())
    text = Text()
    for ids, learned, is_control in _runs(row.ids_T[:SHOWN_TOKENS].tolist(), row.supervised_T.tolist(), control):
        style = ("bold " if is_control else "") + ("green" if learned else "blue" if is_control else "dim")
        text.append(tokenizer.decode(ids, skip_special_tokens=False), style=style)
    if len(row.ids_T) > SHOWN_TOKENS:
        text.append(f" ... and {len(row.ids_T) - SHOWN_TOKENS} tokens", style="italic")
    title = f"{row.origin}  {len(row.ids_T)} tokens, {row.supervised_tokens} learned (green)"
    return Panel(text, title=Text(title), title_align="left")


def _runs(ids: list[int], learned: list[bool], control: set[int]) -> list[tuple[list[int], bool, bool]]:
    """Group tokens that are shown alike: parts of one character must be decoded together."""
    runs: list[tuple[list[int], bool, bool]] = []
    for token, is_learned in zip(ids, learned, strict=False):
        kind = (is_learned, token in control)
        if runs and runs[-1][1:] == kind and not kind[1]:
            runs[-1][0].append(token)
        else:
            runs.append(([token], *kind))
    return runs


def draw(checked: Checked, path: Path) -> None:
    """Draw the distribution of lengths into a PNG.

    Errors:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--png needs matplotlib: pip install -c constraints.txt matplotlib.") from error
    import io

    n = checked.audit.lengths
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.hist(checked.rows.full_lengths, bins=60, color="#1f6feb")
    for at, name, color in ((n.max_seq_length, "max_seq_length", "#cf222e"), (n.proposed, "proposed", "#1a7f37")):
        if at <= 2 * n.longest:
            axes.axvline(at, color=color, linewidth=1.5, label=f"{name}={at}")
    axes.set(xlabel="tokens a row", ylabel="rows", title=f"{checked.audit.rows:,} rows, median {n.median} tokens")
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    write_bytes(path, buffer.getvalue())
