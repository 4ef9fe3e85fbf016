"""A row as it is trained on, for a terminal: what is supervised, the template's tokens, and what is else unseen."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from rich.text import Text

from sftx.data.encode.row import Row
from sftx.terminal import visible

SHOWN_TOKENS = 400
"""Tokens of a row that are shown, at most."""
CONTEXT = 16
"""Tokens before a stretch with which it is decoded."""
SUPERVISED, CONTROL, READ, MARK = "green", "bold cyan", "", "dim"
BRACKETS = "⟦⟧"
"""Stand around what is supervised where there are no colours."""
ENDING_BLANKS = re.compile(r" +(?=\n|$)")


def legend(*, colours: bool) -> Text:
    """Say how a preview is read."""
    if not colours:
        return Text(f"Trained on ({BRACKETS[0]}supervised{BRACKETS[1]}; ↵ a line end, · a blank that ends a line):")
    return Text.assemble(
        "Trained on (", ("supervised", SUPERVISED), ", only read, ", ("template token", CONTROL), ", ",
        ("↵", MARK), " a line end, · a blank that ends a line):",
    )  # fmt: skip


def heading(row: Row) -> Text:
    """Name a row and count its tokens."""
    cut = f" of {row.full_length:,}, the rest is cut off" if row.truncated else ""
    return Text(
        f"{visible(row.origin)}  {len(row.ids_T):,} tokens{cut}; {row.supervised_tokens:,} supervised", style="bold"
    )


def preview(row: Row, tokenizer: Any, control: set[int], *, colours: bool) -> Text:
    """Decode the very ids of a row, so that what a tokenizer changes or drops is seen."""
    text, done = Text(), 0
    for start, stop in _stretches(len(row.ids_T), int(row.supervised_T.argmax())):
        if start > done:
            text.append(f" ... {start - done:,} tokens ... ", style="italic")
        _append_tokens(text, row, range(start, stop), tokenizer, control, colours=colours)
        done = stop
    if done < len(row.ids_T):
        text.append(f" ... and {len(row.ids_T) - done:,} tokens", style="italic")
    return text


def _stretches(length: int, supervised: int) -> list[tuple[int, int]]:
    """Return which tokens are shown: the first, and those around the beginning of what is supervised."""
    if supervised <= SHOWN_TOKENS // 2:
        return [(0, min(length, SHOWN_TOKENS))]
    head = SHOWN_TOKENS // 4
    start = max(head, supervised - head)
    return [(0, head), (start, min(length, start + SHOWN_TOKENS - head))]


def _append_tokens(text: Text, row: Row, shown: range, tokenizer: Any, control: set[int], *, colours: bool) -> None:
    """Append a stretch of a row's tokens."""
    first = max(0, shown.start - CONTEXT)
    ids = row.ids_T[first : shown.stop].tolist()
    runs = list(_runs(ids[shown.start - first :], row.supervised_T[shown.start :].tolist(), control))

    def decoded(stop: int) -> str:
        # From the context on each time: some decoders drop the blank before the first token they are given.
        ended = ids[: shown.start - first + stop]
        return tokenizer.decode(ended, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    before = decoded(0) if first < shown.start else ""
    for i, (end, supervised, is_control) in enumerate(runs):
        whole = decoded(end)
        style = SUPERVISED if supervised else CONTROL if is_control else READ
        if supervised and not colours and not (i and runs[i - 1][1]):
            text.append(BRACKETS[0])
        part = whole[len(before) :]
        if end == len(shown) and shown.stop < len(row.ids_T):
            part = part.rstrip("\ufffd")  # of a character that is shown in part
        _append(text, part, f"bold {style}" if supervised and is_control else style)
        if supervised and not colours and not (i + 1 < len(runs) and runs[i + 1][1]):
            text.append(BRACKETS[1])
        before = whole


def _runs(ids: Sequence[int], supervised: Sequence[bool], control: set[int]) -> Iterator[tuple[int, bool, bool]]:
    """Yield the end of each run of tokens that are shown alike, whether it is supervised, and whether it is control."""
    kinds = [(bool(is_supervised), token in control) for token, is_supervised in zip(ids, supervised, strict=False)]
    for end, kind in enumerate(kinds, 1):
        if end == len(kinds) or kinds[end] != kind:
            yield end, *kind


def _append(text: Text, part: str, style: str) -> None:
    """Append text with what cannot be seen written out: a terminal must not obey what a cell holds."""
    part = ENDING_BLANKS.sub(lambda m: "·" * len(m[0]), part)
    for unseen, characters in groupby(part, _unseen):
        if not unseen:
            text.append("".join(characters), style=style)
            continue
        for character in characters:
            text.append("↵\n" if character == "\n" else f"<U+{ord(character):04X}>", style=MARK)


def _unseen(character: str) -> bool:
    """True for control characters and blanks that look like none or like others; a wide blank is seen."""
    return character not in " \u3000\u200d" and unicodedata.category(character) in (
        "Cc",
        "Cf",
        "Co",
        "Cn",
        "Zs",
        "Zl",
        "Zp",
    )
