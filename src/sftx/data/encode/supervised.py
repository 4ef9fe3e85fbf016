"""Is each supervised turn taught whole, once, and with an end?

The check looks at what was rendered, so it holds for any template: the text of every supervised message occurs
exactly once in what is supervised of it, and its last id is one at which generation stops.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

from sftx.data.encode.fit import Draft
from sftx.data.encode.spans import Piece
from sftx.data.encode.special_tokens import THINKING, SpecialTokens
from sftx.data.records.record import Message, Record

CLOSE = "</think>"
CALLED = "the name of its call"
Answers = Callable[[Record, int], str]
"""Renders what is supervised of one message of another record."""


def fault_in(
    record: Record,
    rows: Sequence[Sequence[Piece]],
    drafts: Sequence[Draft],
    special: SpecialTokens,
    stop_ids: Collection[int],
    answer_of: Answers,
) -> str | None:
    """Return what is wrong with a record's supervised turns before any row is cut, or None."""
    for piece in (piece for row in rows for piece in row):
        if fault := _text_fault(record, piece, special, answer_of):
            return f"turn {piece.message + 1}: {fault}"
    for draft in drafts:
        for answer in draft.answers:
            if (last := draft.ids[answer.stop - 1]) not in stop_ids:
                ends = special.tokenizer.convert_ids_to_tokens(last)
                stops = ", ".join(special.tokenizer.convert_ids_to_tokens(sorted(stop_ids)))
                return (
                    f"turn {answer.index + 1}: what is supervised ends in {ends!r}, at which generation does not stop; "
                    f"expected one of {stops}. Add its id to eos_token_id in the model's generation_config.json, "
                    f"or choose another template_name"
                )
    return None


def _text_fault(record: Record, piece: Piece, special: SpecialTokens, answer_of: Answers) -> str | None:
    message, answer = record.messages[piece.message], piece.answer
    inline = THINKING.match(message.content)
    if message.reasoning and inline:
        return (
            "it has reasoning of its own and other thinking inside its text, of which a model writes only one; delete "
            "one of them, or leave such rows out: data.on_bad_rows=skip"
        )
    texts = [message.content.strip()] if not inline else [part.strip() for part in inline.group(2, 4)]
    names = ["its text"] if not inline else ["its thinking", "its text"]
    if message.reasoning:
        texts.append(message.reasoning.strip())
        names.append("its reasoning")
    for call in message.tool_calls:
        texts.append(str(call.get("function", call).get("name", "")))
        names.append(CALLED)
    own = [special.escape(text) for text in texts]
    for i, text in enumerate(own):
        if not text or (found := answer.count(text)) == sum(other.count(text) for other in own):
            continue
        if found:  # a short text may also occur in what the template writes around it: ask with one that cannot
            marker = "Q" + secrets.token_hex(8)
            messages = list(record.messages)
            messages[piece.message] = _with(message, i, marker)
            found = answer_of(replace(record, messages=tuple(messages)), piece.message).count(marker)
        if found != 1 and not (found and names[i] == CALLED):  # some templates write a call's name twice
            return _says(names[i], texts[i], found)
    for value in _arguments(message):
        if not any(special.escape(spelled) in answer for spelled in _spellings(value)):
            return _says("an argument of its call", value, 0)
    if blocks := answer.count(CLOSE):
        blocks += piece.tail.rstrip().endswith(CLOSE)  # a prompt may close the thinking before the answer
        blocks -= sum(text.count(CLOSE) for text in own)
    return _says("its block of thinking", CLOSE, blocks) if blocks > 1 else None


def _says(name: str, text: str, found: int) -> str:
    shown = text if len(text) <= 40 else text[:40] + "..."
    times = "is missing from" if not found else f"occurs {found} times in"
    return (
        f"{name} ({shown!r}) {times} what the chat template makes of the turn, expected once. Delete it from the row, "
        f"choose a template_name that writes it, or leave such rows out: data.on_bad_rows=skip"
    )


def _with(message: Message, number: int, text: str) -> Message:
    """Return a message with another text in the place of its `number`-th."""
    inline = THINKING.match(message.content)
    contents = [text] if not inline else _thinking_with(inline.groups(), text)
    if number < len(contents):
        return replace(message, content=contents[number])
    number -= len(contents)
    if message.reasoning:
        if number == 0:
            return replace(message, reasoning=text)
        number -= 1
    calls = [dict(call) for call in message.tool_calls]
    if "function" in calls[number]:
        calls[number]["function"] = calls[number]["function"] | {"name": text}
    else:
        calls[number]["name"] = text
    return replace(message, tool_calls=tuple(calls))


def _thinking_with(parts: Sequence[str], text: str) -> list[str]:
    """Return an answer's content with its thought replaced, and with what follows it."""
    opening, thought, close, rest = parts
    return [opening + text + close + rest, opening + thought + close + text]


def _arguments(message: Message) -> Iterator[str]:
    """Yield the texts among the arguments of a message's calls; a template may write those in any order."""
    for call in message.tool_calls:
        arguments = call.get("function", call).get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                continue
        yield from filter(None, map(str.strip, _leaves(arguments)))


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)


def _spellings(text: str) -> Iterator[str]:
    """Yield a text as it is and as JSON spells it, also JSON within JSON."""
    yield text
    for ascii_only in (False, True):
        once = json.dumps(text, ensure_ascii=ascii_only)[1:-1]
        yield once
        yield json.dumps(once, ensure_ascii=ascii_only)[1:-1]
