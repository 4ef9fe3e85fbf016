"""A row as it is trained on, for a terminal: what is learned, the template's tokens, and what is else unseen."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from rich.text import Text

from sftx.data.rows import Row
from sftx.terminal import visible

SHOWN_TOKENS = 400
"""Tokens of a row that are shown, at most."""
LEARNED, CONTROL, READ, MARK = "green", "bold cyan", "", "dim"
BRACKETS = "⟦⟧"
"""Stand around what is learned where there are no colours."""
ENDING_BLANKS = re.compile(r" +(?=\n|$)")


def legend(*, colours: bool) -> Text:
    """Say how a preview is read."""
    if not colours:
        return Text(f"Trained on ({BRACKETS[0]}learned{BRACKETS[1]}; ↵ a line end, · a blank that ends a line):")
    return Text.assemble(
        "Trained on (", ("learned", LEARNED), ", only read, ", ("template token", CONTROL), ", ",
        ("↵", MARK), " a line end, · a blank that ends a line):",
    )  # fmt: skip


def heading(row: Row) -> Text:
    """Name a row and count its tokens."""
    cut = f" of {row.full_length:,}, the rest is cut off" if row.truncated else ""
    return Text(
        f"{visible(row.origin)}  {len(row.ids_T):,} tokens{cut}; {row.supervised_tokens:,} learned", style="bold"
    )


def preview(row: Row, tokenizer: Any, control: set[int], *, colours: bool) -> Text:
    """Decode the very ids of a row, so that what a tokenizer changes or drops is seen."""
    text = Text()
    ids = row.ids_T[:SHOWN_TOKENS].tolist()
    runs = list(_runs(ids, row.supervised_T.tolist(), control))
    shown = ""
    for i, (end, learned, is_control) in enumerate(runs):
        # The whole is decoded each time: some decoders drop the blank before the first token they are given.
        whole = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        style = LEARNED if learned else CONTROL if is_control else READ
        if learned and not colours and not (i and runs[i - 1][1]):
            text.append(BRACKETS[0])
        part = whole[len(shown) :]
        if end == len(ids) < len(row.ids_T):
            part = part.rstrip("\ufffd")  # of a character that is shown in part
        _append(text, part, f"bold {style}" if learned and is_control else style)
        if learned and not colours and not (i + 1 < len(runs) and runs[i + 1][1]):
            text.append(BRACKETS[1])
        shown = whole
    if len(row.ids_T) > SHOWN_TOKENS:
        text.append(f" ... and {len(row.ids_T) - SHOWN_TOKENS:,} tokens", style="italic")
    return text


def _runs(ids: Sequence[int], learned: Sequence[bool], control: set[int]) -> Iterator[tuple[int, bool, bool]]:
    """Yield the end of each run of tokens that are shown alike, whether it is learned, and whether it is control."""
    kinds = [(bool(is_learned), token in control) for token, is_learned in zip(ids, learned, strict=False)]
    for end, kind in enumerate(kinds, 1):
        if end == len(kinds) or kinds[end] != kind:
            yield end, *kind


def _append(text: Text, part: str, style: str) -> None:
    """Append text with what cannot be seen written out: a terminal must not obey what a cell holds."""
    part = ENDING_BLANKS.sub(lambda m: "·" * len(m[0]), part)
    for unseen, letters in groupby(part, _unseen):
        if not unseen:
            text.append("".join(letters), style=style)
            continue
        for letter in letters:
            text.append("↵\n" if letter == "\n" else f"<U+{ord(letter):04X}>", style=MARK)


def _unseen(letter: str) -> bool:
    """True for control characters and blanks that look like none or like others; a wide blank is seen."""
    return letter not in " \u3000\u200d" and unicodedata.category(letter) in ("Cc", "Cf", "Co", "Cn", "Zs", "Zl", "Zp")
