"""The report of `sftx data check`: made, shown in a terminal, and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sftx.build import build
from sftx.commands.preview import heading, legend, preview
from sftx.config.schema import TrainConfig
from sftx.data.corpus import Corpus, LoadedFile
from sftx.data.encode.template import ChatTemplate
from sftx.data.files.sources import fetch, find_sources
from sftx.data.prepare import Data, rows_of, select_from, tokenise
from sftx.data.records.audit import LISTED, Audit, audit
from sftx.data.records.choose import choose, facts_of
from sftx.data.records.record import Record
from sftx.data.store.record_store import RecordView
from sftx.data.store.rows import Rows
from sftx.errors import DataError
from sftx.files import write_bytes
from sftx.model.loading.family import family_named, family_of
from sftx.model.loading.load import find_model, load_template
from sftx.terminal import visible, visible_lines

BAR = 40


@dataclass(frozen=True)
class Epoch:
    """What one epoch of a run would train on, and what it would be evaluated on."""

    rows: int
    tokens: int
    supervised_tokens: int
    held_out_rows: int
    held_out_files: list[str]
    """Empty when the rows are held out of the corpus itself."""


@dataclass(frozen=True)
class Checked:
    """What was found, and what it was found in."""

    config: TrainConfig
    loaded: LoadedFile
    rows: Rows
    template: ChatTemplate
    audit: Audit
    left_out: list[str]
    """Records that are not used, as `file:line: why`."""
    epoch: Epoch | None
    refused: str | None
    """Why a run would be refused, if it would, though the files can be read."""
    near: float | None

    @property
    def evaluates(self) -> bool:
        """True when a run would hold something out."""
        return self.epoch is not None and self.epoch.held_out_rows > 0


def check(files: Sequence[str], held_out: Sequence[str], config: TrainConfig, *, near: float | None) -> Checked:
    """Read, choose and tokenise as a run would.

    Raises:
        SftxError: files that cannot be read, or hold nothing to train on.
    """
    corpus: Corpus = build(config.data)
    loaded = _load(corpus, files, config)
    held = _load(corpus, held_out, config) if held_out else None
    source = find_model(config.model_name_or_path)
    family, _ = family_of(config.model, source.model_type, downloaded=source.downloaded)
    template = load_template(
        source,
        family,
        config.template_name,
        family_named,
        date=config.template_date,
        trust_remote_code=config.trust_remote_code,
    )
    facts = facts_of(loaded.records)
    choice = choose(facts, loaded.records, corpus.choose_policy(), config.seed)
    rows, _ = rows_of(loaded, choice.kept, corpus, config, template)
    training: Sequence[Record] = ()
    evaluated: Sequence[Record] = ()
    epoch, refused = None, None
    try:
        selection = select_from(loaded, held, corpus, config)
        epoch = _epoch(tokenise(selection, config, template), held)
        training = RecordView(loaded.records, np.unique(selection.training))
        evaluated = RecordView((held or loaded).records, selection.held_out)
    except DataError as error:
        refused = str(error)
    found = audit(loaded.records, facts, rows, config.max_seq_length, training=training, held_out=evaluated, near=near)
    left = [*loaded.skipped(), *(f"{loaded.records.origin(i)}: {why}" for i, why in choice.left_out)]
    return Checked(config, loaded, rows, template, found, left, epoch, refused, near)


def _epoch(data: Data, held: LoadedFile | None) -> Epoch:
    return Epoch(
        len(data.train),
        data.train.tokens,
        int(data.train.supervised.sum()),
        len(data.held_out),
        [str(f["path"]) for f in held.files] if held else [],
    )


def _load(corpus: Corpus, files: Sequence[str], config: TrainConfig) -> LoadedFile:
    sources = [s for f in files for s in find_sources(".", f, key="")]
    return corpus.read(fetch(sources, key=""), keep_columns=not config.remove_unused_columns)


def show(checked: Checked, *, rows: int, terminal: TextIO) -> None:
    """Print the report."""
    console = Console(file=terminal, highlight=False)
    a = checked.audit
    console.print(_files(checked.loaded))
    for note in checked.loaded.notes:
        console.print(Text(visible(f"note: {note}"), style="yellow"), soft_wrap=True)
    for said in checked.loaded.columns:
        console.print(Text(f"columns: {visible(said)}"), soft_wrap=True)
    console.print(Text(f"\n{visible_lines(_totals(checked))}"), soft_wrap=True)
    console.print(_lengths(a))
    console.print(Padding(_categories(a), (0, 0, 1, 0)))
    found = _findings(checked)
    none = [title for title, places in found if not places]
    if none:
        console.print(Text(f"none: {', '.join(none)}", style="green"))
    for title, places in found:
        if places:
            console.print(Text(f"{title}: {len(places):,}", style="yellow"))
            for place in places[:LISTED]:
                console.print(Text(visible(f"  {place}")), soft_wrap=True)
        if len(places) > LISTED:
            console.print(f"  and {len(places) - LISTED:,} more (--json names all)")
    colours = console.color_system is not None
    control = set(checked.template.tokenizer.all_special_ids) | set(checked.template.stop_ids())
    typical = _typical(checked.rows, rows)
    if typical:
        console.print(Padding(legend(colours=colours), (1, 0, 0, 0)))
    for row in map(checked.rows.row, typical):
        text = preview(row, checked.template.tokenizer, control, colours=colours)
        console.print(Padding(heading(row), (1, 0, 0, 0)), Padding(text, (0, 0, 0, 2)), sep="")


def _totals(checked: Checked) -> str:
    a, config, epoch = checked.audit, checked.config, checked.epoch
    lines = [
        f"{a.records:,} records -> {a.rows:,} rows, {a.tokens:,} tokens, {a.supervised_tokens:,} of them supervised "
        f"({config.model_name_or_path}; template: {checked.template.origin})"
    ]
    if epoch:
        held = f"{epoch.held_out_rows:,} held out" if epoch.held_out_rows else "nothing held out"
        where = f" ({', '.join(epoch.held_out_files)})" if epoch.held_out_files else ""
        lines.append(
            f"an epoch of a run: {epoch.rows:,} rows, {epoch.tokens:,} tokens, "
            f"{epoch.supervised_tokens:,} of them supervised; {held}{where}"
        )
    return "\n".join(lines)


def _findings(checked: Checked) -> list[tuple[str, list[str]]]:
    a = checked.audit
    return [
        ("left out", checked.left_out),
        ("no supervised tokens", a.untrainable),
        (f"longer than max_seq_length={checked.config.max_seq_length}", a.truncated),
        ("duplicates", a.duplicates),
        *([("near-duplicates", a.near_duplicates)] if checked.near is not None else []),
        ("one question with several answers", a.conflicts),
        *([("held-out questions that are trained on", a.leaks)] if checked.evaluates else []),
    ]


def _files(loaded: LoadedFile) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("rows", "format", "encoding", "delimiter", "schema", "file"):
        table.add_column(name, justify="right" if name == "rows" else "left", overflow="fold", no_wrap=name != "file")
    for f in loaded.files:
        delimiter = {"\t": "tab", None: "-"}.get(f["delimiter"], f["delimiter"])
        cells = (f"{f['rows']:,}", *(str(f[k] or "-") for k in ("format", "encoding")), delimiter, f["schema"] or "-")
        table.add_row(*(Text(visible(cell)) for cell in (*cells, str(f["path"]))))
    return table


def _lengths(found: Audit) -> Text:
    """Draw the distribution; what is longer than `max_seq_length` is yellow."""
    n = found.lengths
    most = max(count for *_, count in n.histogram)
    names = [f"{low:,}-{high:,}" for low, high, _ in n.histogram]
    width = max(map(len, names))
    text = Text.assemble("\n", ("tokens per row", "bold"), "\n")
    for name, (low, _, count) in zip(names, n.histogram, strict=True):
        style = "yellow" if low > n.max_seq_length else "cyan"
        bar = _bar(count / most)
        text.append(f"{name:>{width}} ").append(bar + " " if bar else "", style=style).append(f"{count:,}\n")
    if found.untrainable:
        text.append(f"rows without supervised tokens are not counted: {len(found.untrainable):,}\n", style="yellow")
    text.append(f"median {n.median:,}, p90 {n.p90:,}, p99 {n.p99:,}, max {n.longest:,}\n")
    of = f"the other {found.rows:,} rows" if found.untrainable else "the rows"
    text.append(f"max_seq_length={n.max_seq_length} covers {n.covered:.1%} of {of}; ")
    return text.append(f"proposed: {n.proposed}, which covers {n.proposed_covers:.1%}\n")


def _bar(share: float) -> str:
    """Return a bar in eighths of a letter; what is there at all is seen."""
    eighths = max(1, round(8 * BAR * share)) if share else 0
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _categories(found: Audit) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("category", "records", "tokens", "supervised", "languages, by script"):
        table.add_column(name, justify="left" if name[0] in "cl" and name != "supervised" else "right", overflow="fold")
    for name, c in found.categories.items():
        languages = ", ".join(f"{k} {v:,}" for k, v in c.languages.items())
        table.add_row(Text(visible(name)), f"{c.rows:,}", f"{c.tokens:,}", f"{c.supervised_tokens:,}", languages)
    return table


def _typical(rows: Rows, count: int) -> list[int]:
    """Return rows of middling length, in the corpus's order."""
    order = np.argsort(rows.full_lengths, kind="stable")
    middle = len(order) // 2
    start = max(0, middle - count // 2)
    return sorted(order[start : start + count].tolist())


def draw(checked: Checked, path: Path) -> None:
    """Draw the distribution of lengths into a PNG."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n, lengths = checked.audit.lengths, checked.rows.full_lengths
    reach = min(n.longest, 2 * max(n.p99, n.proposed))  # one very long row would leave a single bar
    beyond = int((lengths > reach).sum())
    figure = Figure(figsize=(8, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.hist(lengths[lengths <= reach], bins=60, range=(0, reach), color="#1f6feb")
    for at, covered, name, color in (
        (n.max_seq_length, n.covered, "max_seq_length", "#cf222e"),
        (n.proposed, n.proposed_covers, "proposed", "#1a7f37"),
    ):
        if at <= 1.1 * reach:
            axes.axvline(at, color=color, linewidth=1.5, label=f"{name}={at} covers {covered:.1%}")
    more = f"; {beyond:,} longer than {reach:,}, up to {n.longest:,}" if beyond else ""
    axes.set(xlabel="tokens per row", ylabel="rows", title=f"{checked.audit.rows:,} rows, median {n.median:,}{more}")
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    write_bytes(path, buffer.getvalue())
