"""Records to token ids and to what each token weighs in the loss.

The text is what the chat template renders. It is tokenised as inference would tokenise it: the
template's special tokens become special tokens, the same text inside a cell stays plain text, and
an answer's first token is a token of its own, because at inference the prompt ends there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sftx.data.encode.fit import Answer, Draft, fit
from sftx.data.encode.policy import EncodePolicy, Weights
from sftx.data.encode.render import Renderer
from sftx.data.encode.row import Row
from sftx.data.encode.spans import Piece, TurnReader, pieces
from sftx.data.encode.special_tokens import SpecialTokens
from sftx.data.encode.supervised import fault_in
from sftx.data.records.record import Message, Record
from sftx.errors import ConfigError, ModelError, did_you_mean

TEMPLATES = Path(__file__).parent / "templates"
PROBE = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": "Answer"}]
"""The conversation by which a template is tried out before any row is rendered."""
CHUNK = 2048
"""Records encoded at a time."""
LOOKED_AT = 1000
"""Rows from which is read whether a corpus was tokenised with thinking."""
Pieces = list[list[Piece]]


@dataclass
class _Tried:
    """A record on its way to rows; `rows` is the reason when there are none."""

    record: Record
    weights: Weights = ()
    rows: Pieces | str = ""
    drafts: list[Draft] = field(default_factory=list)


def template_source(name: str) -> str:
    """Return the Jinja text of one of sftx's own templates.

    Raises:
        ConfigError: there is no template of that name.
    """
    path = TEMPLATES / f"{name}.jinja"
    known = sorted(p.stem for p in TEMPLATES.glob("*.jinja"))
    if not path.is_file():
        raise ConfigError(
            f"template_name={name}: no such template.{did_you_mean(name, known)} Known: {', '.join(known)}, "
            f"and the model types of conf/model/*.yaml."
        )
    return path.read_text(encoding="utf-8")


class ChatTemplate:
    """Renders and tokenises conversations for one tokenizer.

    Raises:
        ModelError: the template cannot render, renders the prompt otherwise in training than at
            inference, or there is no token that could end a turn.
    """

    def __init__(self, tokenizer: Any, source: str, stop_tokens: Sequence[str], date: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.source = source
        self.origin = "given"
        """Which template it is and whose, as the header states it."""
        self.remarks: list[str] = []
        self.changed: dict[str, str] = {}
        """What `final/` must set over the base's own tokenizer files: `chat_template`, `pad_token`."""
        added = {t.content for t in tokenizer.added_tokens_decoder.values()}
        self.stop_tokens = [t for t in dict.fromkeys(stop_tokens) if t in added]
        if not self.stop_tokens and tokenizer.eos_token is not None:
            self.stop_tokens = [tokenizer.eos_token]
        self._special = SpecialTokens(tokenizer, self.stop_tokens)
        self._renderer = Renderer(tokenizer, source, date)
        self._adopt_end_token()

    def _adopt_end_token(self) -> None:
        """Let generation end at the token that ends the template's own turns, whatever the family says."""
        reader = TurnReader(self._renderer, self.stop_tokens, self._special)
        completion = reader.rendered(PROBE, 1, None)[1]
        if completion == reader.rendered([PROBE[0], PROBE[1] | {"content": "Other"}], 1, None)[1]:
            raise ModelError(
                "the chat template leaves out what an assistant says, as templates for images do when a text is not a "
                "list of parts: nothing could be trained on. Choose another template_name."
            )
        rest = completion.rpartition(PROBE[-1]["content"])[2]
        ends = self._special.pattern.findall(rest)
        if ends:  # first of them: no other token of a model's EOS ids ends a plain answer
            end = next((token for token in ends if token in self.stop_tokens), ends[0])
            self.stop_tokens = list(dict.fromkeys([end, *self.stop_tokens]))
        if not self.stop_tokens:
            raise ModelError("the tokenizer has no end-of-sequence token: the model could never stop.")

    @property
    def thinking_switch(self) -> str | None:
        """The template's option for thinking, mostly `enable_thinking`; None when it has none."""
        return self._renderer.thinking_switch

    @property
    def date(self) -> str | None:
        """The day, as YYYY-MM-DD, that the template writes as today; None when it writes none."""
        return self._renderer.date

    @cached_property
    def _stop_ids(self) -> set[int]:
        return set(self.stop_ids())

    def stop_ids(self) -> list[int]:
        """Return the ids at which generation ends."""
        return [self.tokenizer.convert_tokens_to_ids(t) for t in self.stop_tokens]

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        generation_prompt: bool,
        tools: Sequence[dict[str, Any]] = (),
        thinking: bool | None = None,
    ) -> str:
        """Return the text that the template makes of messages; `thinking` is Qwen3's switch `enable_thinking`."""
        return self._renderer.render(messages, generation_prompt=generation_prompt, tools=tools, thinking=thinking)[0]

    def prompt_ids(
        self, messages: list[dict[str, Any]], *, tools: Sequence[dict[str, Any]] = (), thinking: bool | None = None
    ) -> list[int]:
        """Return the tokens that generation starts from: the same that training put before the answer.

        Training asks a template with a switch for thinking for none where an answer has no reasoning:
        `thinking_of` returns the switch that it used.
        """
        text = self.render(
            self._special.escape_all(messages),
            generation_prompt=True,
            tools=self._special.escape_all(tools),
            thinking=thinking,
        )
        return self._special.tokenise(text)

    def thinking_of(self, rows: Sequence[Row]) -> bool | None:
        """Return the switch for thinking that rows were rendered with; None if the template has none, or they differ.

        Read from the tokens before the answers, of rows all over the corpus: the store keeps no reasoning.
        """
        if not self.thinking_switch:
            return None
        off, on = (self.prompt_ids(PROBE[:1], thinking=thinking) for thinking in (False, True))
        if off == on:
            return None
        same = next((i for i, (a, b) in enumerate(zip(off, on, strict=False)) if a != b), min(len(off), len(on)))
        tails = sorted(((off[same:], False), (on[same:], True)), key=lambda tail: -len(tail[0]))
        found: set[bool | None] = set()
        for index in range(0, len(rows), max(1, len(rows) // LOOKED_AT)):
            row = rows[index]
            before = row.ids_T[: int(row.supervised_T.argmax())].tolist()
            found.add(next((switch for tail, switch in tails if before[len(before) - len(tail) :] == tail), None))
        return found.pop() if len(found) == 1 else None

    def encode(self, record: Record, policy: EncodePolicy) -> list[Row] | str:
        """Return a record's rows, or the reason why it cannot be trained on.

        Supervised are the supervised turns' tokens and the token that ends each; nothing else.

        Raises:
            ModelError: the template does not teach a turn whole and once, unless the policy skips such records.
        """
        return self.encode_batch([record], policy)[0]

    def encode_batch(self, records: Sequence[Record], policy: EncodePolicy) -> list[list[Row] | str]:
        """Return what `encode` returns for each record, tokenising many texts at a time."""
        return [
            rows
            for start in range(0, len(records), CHUNK)
            for rows in self._encoded(records[start : start + CHUNK], policy)
        ]

    def _encoded(self, records: Sequence[Record], policy: EncodePolicy) -> list[list[Row] | str]:
        tried = [_Tried(policy.applied(record)) for record in records]
        for one in tried:
            with self._refusing(one, policy):
                one.record = self._renderer.canonical(one.record)
                one.weights = policy.weights(one.record)
                one.rows = self._rendered(one.record, one.weights)
        ids = self._tokenised(row for one in tried if not isinstance(one.rows, str) for row in one.rows)
        for one in tried:
            with self._refusing(one, policy):
                if not isinstance(one.rows, str):
                    one.drafts = self._drafted(one.rows, one.weights, ids)
                    if policy.faults != "ignore":
                        self._check(one)
        return [self._fitted(one, policy) for one in tried]

    @contextmanager
    def _refusing(self, one: _Tried, policy: EncodePolicy) -> Iterator[None]:
        try:
            yield
        except ModelError as error:
            if policy.faults != "skip":
                raise ModelError(f"{one.record.origin}: {error}") from error
            one.rows = str(error)

    def _check(self, one: _Tried) -> None:
        """Raise if a supervised turn would not be taught whole, once and with an end.

        Raises:
            ModelError: it would not; the message names what was found.
        """

        def answer_of(other: Record, index: int) -> str:
            found = self._rendered(other, one.weights)
            return "" if isinstance(found, str) else next(p.answer for r in found for p in r if p.message == index)

        assert not isinstance(one.rows, str)
        if fault := fault_in(one.record, one.rows, one.drafts, self._special, self._stop_ids, answer_of):
            raise ModelError(f"{fault}.")

    def _fitted(self, one: _Tried, policy: EncodePolicy) -> list[Row] | str:
        if isinstance(one.rows, str):
            return one.rows
        record = one.record
        if all(len(d) <= policy.max_length for d in one.drafts):
            return [d.row(record) for d in one.drafts]
        weighed = [replace(m, weight=w) for m, w in zip(record.messages, one.weights, strict=True)]

        def again(messages: Sequence[Message]) -> list[Draft] | str:
            if not any(m.weight for m in messages):
                return []
            return self._drafts(replace(record, messages=tuple(messages)), [m.weight or 0.0 for m in messages])

        return fit(one.drafts, replace(record, messages=tuple(weighed)), policy, again)

    def _drafts(self, record: Record, weights: Weights) -> list[Draft] | str:
        """Return a record's rows at full length, from what the template renders of it."""
        rows = self._rendered(record, weights)
        return rows if isinstance(rows, str) else self._drafted(rows, weights, self._tokenised(rows))

    def _rendered(self, record: Record, weights: Weights) -> Pieces | str:
        """Return the pieces of a record's rows."""
        supervised = [i for i, weight in enumerate(weights) if weight]
        if not supervised:
            return "none of its turns is supervised: each has weight 0"
        if supervised[0] == 0:
            return "it begins with an answer: there is no prompt before it"
        tools = self._special.escape_all(record.tools)
        reader = TurnReader(self._renderer, self.stop_tokens, self._special, tools)
        self._renderer.check_tools(record)
        failed: list[ModelError] = []
        for json_arguments in (False, True) if any(m.tool_calls for m in record.messages) else (False,):
            messages = self._renderer.dicts(record.messages, self._special, json_arguments=json_arguments)
            try:
                turns = [reader.turn(messages, i) for i in supervised]
                return [pieces(row, self._special) for row in reader.rows(turns)]
            except ModelError as error:
                failed.append(error)
        raise failed[0]

    def _tokenised(self, rows: Iterable[list[Piece]]) -> dict[str, list[int]]:
        """Return the tokens of all pieces' texts."""
        texts: dict[str, list[int]] = {}
        for row in rows:
            for piece in row:
                texts[piece.head] = texts[piece.tail] = texts[piece.joint] = []
        return dict(zip(texts, self._special.tokenise_all(list(texts)), strict=True))

    def _drafted(self, rows: Pieces, weights: Weights, ids: dict[str, list[int]]) -> list[Draft]:
        """Put tokenised pieces together; a turn whose answer melts into its prompt ends a row."""
        drafts: list[Draft] = []
        for row in rows:
            before: list[int] = []
            answers: list[Answer] = []
            for piece in row:
                head, tail, joint = ids[piece.head] if piece.head else [], ids[piece.tail], ids[piece.joint]
                before = before + (head[1:] if piece.continues else head)
                prompt = before + tail[1:] if piece.cut else before + tail
                clean = joint[: len(tail)] == tail
                if piece.swallows and piece.answer[:1].isspace():
                    clean = False
                answer = joint[len(tail) :] if clean else self._special.tokenise_continuation(piece.answer)
                whole = prompt + answer
                mask = None if piece.marks is None else self._mask(piece, tail if clean else None, len(answer))
                answers.append(Answer(len(prompt), len(whole), weights[piece.message], mask, piece.message))
                if clean:
                    before = whole
                if not clean or piece is row[-1]:
                    drafts.append(Draft(whole, answers))
                    before, answers = (before + joint[1:] if piece.cut else before + joint), []
        return drafts

    def _mask(self, piece: Piece, tail: list[int] | None, length: int) -> np.ndarray:
        """Return which of an answer's tokens the template marks as supervised."""
        marks, answer = piece.marks or [], piece.answer
        bounds = sorted({0, len(answer), *itertools.chain(*marks)})
        parts = [answer[a:b] for a, b in itertools.pairwise(bounds)]
        found, offsets, ends = self._special.ends([piece.tail if tail else "\n", *parts])
        if not tail:
            own = self._special.tokenise_continuation(answer)
            offsets = offsets[len(found) - len(own) :]
        else:
            offsets = offsets[len(tail) :]
        if len(offsets) != length:
            raise ModelError("the chat template's `{% generation %}` marks cut a special token; choose another.")
        lies = dict(zip(bounds, ends, strict=True))
        spans = [(lies[a], lies[b]) for a, b in marks]
        return np.array([any(a < end and start < b for a, b in spans) for start, end in offsets], dtype=bool)
