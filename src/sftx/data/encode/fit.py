"""Rows that are longer than a row may be: what is cut, split, left out or refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from sftx.data.encode.policy import EncodePolicy
from sftx.data.encode.row import Row
from sftx.data.records.record import Message, Record
from sftx.errors import DataError

OVERLAP = 0.25
"""Share of a further row that shows, unsupervised, what came just before its part of a long answer."""


@dataclass(frozen=True)
class Answer:
    """Where an answer lies in a draft, and what its tokens weigh."""

    start: int
    stop: int
    weight: float
    mask: np.ndarray | None = None
    """Bool for each of its tokens, where the template marks only a part as supervised."""
    index: int = 0
    """Its message's number."""


@dataclass(frozen=True)
class Draft:
    """A row before it is known to fit."""

    ids: list[int]
    answers: list[Answer]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def weights_T(self) -> np.ndarray:  # noqa: N802 - a shape suffix
        """What each token weighs."""
        weights = np.zeros(len(self.ids), dtype=np.float32)
        for a in self.answers:
            weights[a.start : a.stop] = a.weight if a.mask is None else np.where(a.mask, a.weight, 0)
        return weights

    def row(self, record: Record, start: int = 0, stop: int | None = None) -> Row:
        """Return it, or a stretch of it, as a row."""
        ids, weights = np.asarray(self.ids[start:stop], dtype=np.int32), self.weights_T[start:stop]
        return Row(ids, weights, record.category, record.origin, len(self.ids))


Encode = Callable[[Sequence[Message]], "list[Draft] | str"]
"""Encodes other messages of the same record; only weights that are not 0 are supervised."""


def fit(drafts: list[Draft], record: Record, policy: EncodePolicy, encode: Encode) -> list[Row] | str:
    """Return a record's rows, none longer than the policy allows, or why it cannot be trained on.

    Args:
        drafts: the record's rows at full length.
        record: the record, its messages with weights of their own.
        policy: what to do with a row that is too long.
        encode: drafts the rows of a part of the record.

    Raises:
        DataError: a row is too long, and the policy is to refuse that.
    """
    limit = policy.max_length
    longest = max(map(len, drafts))
    if longest <= limit:
        return [d.row(record) for d in drafts]
    has = f"it has {longest} tokens, more than max_seq_length={limit}"
    if policy.too_long == "error":
        raise DataError(
            f"{record.origin}: {has}. Raise max_seq_length to {longest}, shorten the conversation, or choose what "
            f"becomes of one that is too long, for example data.too_long=truncate_right."
        )
    if policy.too_long == "drop":
        return f"{has}, and too_long=drop leaves it out; raise max_seq_length to {longest} to use it"
    if policy.too_long == "split":
        return _split(record, limit, encode)
    if policy.too_long == "truncate_right":
        return _cut_right(drafts, record, limit)
    rows = []
    for draft in drafts:
        row = _cut_prompt(draft, record, limit, encode)
        if isinstance(row, str):
            return row
        rows.append(row)
    return rows


def _cut_right(drafts: list[Draft], record: Record, limit: int) -> list[Row] | str:
    """Cut the end off: within the last answer, or after the last whole one when the last begins beyond the limit.

    Where no answer fits, the first is cut. A row of which nothing is left makes the last of the others truncated.
    """
    longest = max(map(len, drafts))
    rows = []
    for draft in drafts:
        stop = len(draft)
        if stop > limit:
            cut = draft is drafts[-1] and draft.answers[-1].start < limit
            stop = limit if cut else max((a.stop for a in draft.answers if a.stop <= limit), default=0)
        rows.append(draft.row(record, 0, stop))
    kept = [row for row in rows if row.supervised_T.any()]
    if not kept:
        before = drafts[0].answers[0].start
        if before >= limit:
            what = "its answer" if sum(len(d.answers) for d in drafts) == 1 else "its first answer"
            return (
                f"{before} prompt tokens leave no room for {what} in max_seq_length={limit}; "
                f"raise max_seq_length to {longest} to use it"
            )
        kept = [row for row in [drafts[0].row(record, 0, limit)] if row.supervised_T.any()]
        if not kept:
            return f"max_seq_length={limit} would cut all supervised tokens; raise it to {longest} to use the row"
    if len(kept) < len(rows):
        kept[-1] = replace(kept[-1], full_length=longest)
    return kept


def _cut_prompt(draft: Draft, record: Record, limit: int, encode: Encode) -> Row | str:
    """Cut the beginning of the conversation: its oldest exchanges, then the beginning of what the user wrote.

    The system's turn and the template's structure stay, and so does the last answer, whole. Answers in the
    exchanges that go are not supervised.
    """
    if len(draft) <= limit:
        return draft.row(record)
    full, supervised = len(draft), {a.index for a in draft.answers}
    messages = [replace(m, weight=m.weight if i in supervised else 0.0) for i, m in enumerate(record.messages)]
    system, rest = exchanges(messages[: draft.answers[-1].index + 1])
    for first in range(1, len(rest)):
        shorter = _single(encode([*system, *chain(*rest[first:])]))
        if shorter is not None and len(shorter) <= limit:
            return replace(shorter.row(record), full_length=full)
    last = rest[-1]
    at = next((i for i, m in enumerate(last) if m.role == "user"), len(last) - 1)

    def without(characters: int) -> Draft:
        shorter_question = replace(last[at], content=last[at].content[characters:])
        return _single(encode([*system, *last[:at], shorter_question, *last[at + 1 :]])) or draft

    fits_not, fits = 0, max(0, len(last[at].content) - 1)  # at least a character stays
    shortest = without(fits) if last[at].role == "user" else draft
    if len(shortest) <= limit:
        while fits - fits_not > 1:
            middle = (fits_not + fits) // 2
            shorter = without(middle)
            fits_not, fits, shortest = (
                (fits_not, middle, shorter) if len(shorter) <= limit else (middle, fits, shortest)
            )
        return replace(shortest.row(record), full_length=full)
    return (
        f"its last answer and the template around it have {len(shortest)} tokens, more than max_seq_length={limit}, "
        f"whatever is cut from the prompt; raise max_seq_length, or choose too_long=split"
    )


def _single(drafts: list[Draft] | str) -> Draft | None:
    """Return the draft with the last answer."""
    return None if isinstance(drafts, str) or not drafts else drafts[-1]


def exchanges(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """Return the system's turns at the beginning, and the rest cut before each question of the user."""
    first = next((i for i, m in enumerate(messages) if m.role != "system"), len(messages))
    out: list[list[Message]] = []
    for before, message in zip([None, *messages[first:]], messages[first:], strict=False):
        if before is None or (message.role == "user" and before.role != "user"):
            out.append([])
        out[-1].append(message)
    return list(messages[:first]), out


def _split(record: Record, limit: int, encode: Encode) -> list[Row] | str:
    """Split a conversation before questions of the user, and a long exchange within its answers.

    Each row begins with the system's turn and holds as many exchanges as fit; what stands in the rows
    before is not shown again. An exchange that is too long alone goes on in further rows.
    """
    system, rest = exchanges(record.messages)
    rows: list[Row] = []
    first = 0
    while first < len(rest):
        stop, drafts = first + 1, encode([*system, *rest[first]])
        while stop < len(rest) and _fits(drafts, limit):
            more = encode([*system, *chain(*rest[first : stop + 1])])
            if not _fits(more, limit):
                break
            stop, drafts = stop + 1, more
        if isinstance(drafts, str):
            return drafts
        rows += [row for draft in drafts for row in _windows(draft, record, limit)]
        first = stop
    return rows


def _fits(drafts: list[Draft] | str, limit: int) -> bool:
    return not isinstance(drafts, str) and all(len(d) <= limit for d in drafts)


def _windows(draft: Draft, record: Record, limit: int) -> list[Row]:
    """Cut a draft into rows so that each token is supervised in exactly one.

    Each further row holds the prompt, then, unsupervised, the end of what was supervised before, then the next
    part: so no row teaches to begin an answer in its middle. A prompt of more than half a row is shown only
    in the first, and only by its end when it leaves less than half of that for the answer.
    """
    if len(draft) <= limit:
        return [draft.row(record)]
    ids, weights = draft.ids, draft.weights_T
    begin = draft.answers[0].start
    prompt = begin if begin <= limit // 2 else 0
    overlap = max(1, int((limit - prompt) * OVERLAP))
    rows, done = [], begin
    while done < len(ids):
        if done == begin:
            head, start = 0, (0 if prompt else begin - min(begin, limit // 2))
        else:
            head, start = prompt, done - overlap
        stop = min(len(ids), start + limit - head)
        shown = np.zeros(done - start + head, dtype=np.float32)
        chosen = np.asarray([*ids[:head], *ids[start:stop]], dtype=np.int32)
        weighed = np.concatenate([shown, weights[done:stop]])
        if weighed.any():
            rows.append(Row(chosen, weighed, record.category, record.origin, len(chosen)))
        done = stop
    return rows
