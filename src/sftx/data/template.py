"""Records to token ids and the mask of what is learned.

The text is what the chat template renders. It is tokenised as inference would tokenise it: the
template's control tokens become control tokens, the same letters inside a cell stay letters, and
the answer is tokenised apart from the prompt, because at inference the prompt ends there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sftx.data.read import Record
from sftx.errors import ConfigError, DataError, ModelError, did_you_mean

TEMPLATES = Path(__file__).parent / "templates"
PRIVATE_USE = 0xF0000
"""Stand-ins for control tokens inside cells, while the template renders (Unicode's plane 15)."""


@dataclass(frozen=True)
class Row:
    """One record as tokens: `ids_T` int32, `supervised_T` bool (true where the token is learned)."""

    ids_T: np.ndarray
    supervised_T: np.ndarray
    category: str
    origin: str
    """`file:line` of the record."""
    full_length: int
    """Tokens before truncation."""

    @property
    def truncated(self) -> bool:
        """True when the end of the answer was cut off."""
        return self.full_length > len(self.ids_T)

    @property
    def supervised_tokens(self) -> int:
        """Tokens that carry loss; the first token of a sequence never does, nothing predicts it."""
        return int(self.supervised_T[1:].sum())


@dataclass(frozen=True)
class Encoding:
    """The rows of a corpus, and those that could not be used, as `file:line: reason`."""

    rows: list[Row]
    skipped: list[str]

    @property
    def truncated(self) -> list[Row]:
        """The rows whose answer lost its end."""
        return [r for r in self.rows if r.truncated]


def template_source(name: str) -> str:
    """Return the Jinja text of one of sftx's own templates.

    Errors:
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
    """Renders and tokenises conversations for one tokenizer."""

    def __init__(self, tokenizer: Any, source: str, stop_tokens: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.source = source
        known = tokenizer.get_vocab()
        self.stop_tokens = [t for t in stop_tokens if t in known]
        if not self.stop_tokens:
            if tokenizer.eos_token is None:
                raise ModelError("the tokenizer has no end-of-sequence token: the model could never stop.")
            self.stop_tokens = [tokenizer.eos_token]

    @cached_property
    def _special(self) -> dict[str, Any]:
        """Control tokens: their text -> the tokenizer's entry."""
        return {t.content: t for t in self.tokenizer.added_tokens_decoder.values() if t.special}

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(re.escape(s) for s in sorted(self._special, key=len, reverse=True)) or r"(?!)")

    def stop_ids(self) -> list[int]:
        """Return the ids at which generation ends."""
        return [self.tokenizer.convert_tokens_to_ids(t) for t in self.stop_tokens]

    def render(self, messages: list[dict[str, str]], *, generation_prompt: bool) -> str:
        """Return the text that the template makes of messages."""
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self.source, tokenize=False, add_generation_prompt=generation_prompt
        )

    def prompt_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """Return the tokens that generation starts from: the same that training put before the answer."""
        return self._tokenise(self.render(self._guard(messages), generation_prompt=True))

    def encode(self, record: Record, max_length: int) -> Row | str:
        """Return a record's tokens and mask, or the reason why it cannot be learned from.

        Learned are the answer's tokens and the token that ends the turn. A row longer than
        `max_length` loses the end of its answer, never all of it.
        """
        prompt, completion = self._texts(record)
        prompt_ids, answer_ids = self._tokenise(prompt), self._tokenise(completion)
        room = max_length - len(prompt_ids)
        if room < 1:
            return (
                f"its prompt alone has {len(prompt_ids)} tokens, so max_seq_length={max_length} would cut the "
                f"whole answer; raise max_seq_length to {len(prompt_ids) + len(answer_ids)} to use it"
            )
        ids = np.asarray(prompt_ids + answer_ids[:room], dtype=np.int32)
        supervised = np.arange(len(ids)) >= len(prompt_ids)
        return Row(ids, supervised, record.category, f"{record.file}:{record.line}", len(prompt_ids) + len(answer_ids))

    def encode_all(self, records: Sequence[Record], max_length: int) -> Encoding:
        """Encode a corpus.

        Errors:
            DataError: no row can be learned from.
        """
        rows, skipped = [], []
        for record in records:
            row = self.encode(record, max_length)
            if isinstance(row, str):
                skipped.append(f"{record.file}:{record.line}: {row}")
            else:
                rows.append(row)
        if records and not rows:
            raise DataError(f"no row can be learned from. The first of {len(skipped)}: {skipped[0]}")
        return Encoding(rows, skipped)

    def _texts(self, record: Record) -> tuple[str, str]:
        """Return the prompt and what the model shall say, up to and with the end of its turn."""
        messages = self._guard(
            [{"role": "user", "content": record.human}, {"role": "assistant", "content": record.assistant}]
        )
        prompt = self.render(messages[:-1], generation_prompt=True)
        whole = self.render(messages, generation_prompt=False)
        if not whole.startswith(prompt):
            raise ModelError(
                "the chat template renders another text before the answer in training than at inference, so what is "
                f"learned would never be asked for. Prompt ends with {prompt[-40:]!r}; choose a template_name."
            )
        completion = whole[len(prompt) :]
        ends = list(self._special_pattern.finditer(completion))
        end = next((m for m in ends if m.group() in self.stop_tokens), ends[0] if ends else None)
        return prompt, completion[: end.end()] if end else completion.rstrip("\n") + self.stop_tokens[0]

    def _guard(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        """Put a stand-in for each control token that is written inside a cell."""
        stand_in = {s: chr(PRIVATE_USE + i) for i, s in enumerate(self._special)}
        return [
            m | {"content": self._special_pattern.sub(lambda f: stand_in[f.group()], m["content"])} for m in messages
        ]

    def _unguard(self, text: str) -> str:
        return re.sub(
            f"[{chr(PRIVATE_USE)}-{chr(PRIVATE_USE + len(self._special))}]",
            lambda f: list(self._special)[ord(f.group()) - PRIVATE_USE],
            text,
        )

    def _tokenise(self, text: str) -> list[int]:
        """Tokenise rendered text: its control tokens are the template's, since cells are guarded."""
        backend = self.tokenizer.backend_tokenizer
        before = backend.encode_special_tokens
        backend.encode_special_tokens = True  # letters that spell a control token stay letters
        try:
            ids: list[int] = []
            at, strip_next = 0, False
            for match in [*self._special_pattern.finditer(text), None]:
                piece = text[at : match.start() if match else len(text)]
                piece = piece.lstrip() if strip_next else piece
                if match and self._special[match.group()].lstrip:
                    piece = piece.rstrip()
                if piece:
                    ids += backend.encode(self._unguard(piece), add_special_tokens=False).ids
                if match:
                    ids.append(self.tokenizer.convert_tokens_to_ids(match.group()))
                    at, strip_next = match.end(), self._special[match.group()].rstrip
            return ids
        finally:
            backend.encode_special_tokens = before
