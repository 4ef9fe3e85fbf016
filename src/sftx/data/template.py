"""Records to token ids and the mask of what is learned.

The text is what the chat template renders. It is tokenised as inference would tokenise it: the
template's control tokens become control tokens, the same letters inside a cell stay letters, and
the answer is tokenised apart from the prompt, because at inference the prompt ends there.

Two spellings keep letters and control tokens apart, both with a random part that no text can hold:
while the template renders, a control token inside a cell has a stand-in; and where there was one,
the text is tokenised by a copy of the tokenizer in which the true control tokens have other names.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sftx.data.record import Record
from sftx.data.rows import Encoding, MemoryRows, Row
from sftx.errors import ConfigError, DataError, ModelError, did_you_mean

TEMPLATES = Path(__file__).parent / "templates"
PROBE = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": "Answer"}]
"""The conversation by which a template is tried out before any row is rendered."""


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
    """Renders and tokenises conversations for one tokenizer.

    Errors:
        ModelError: the template cannot render, renders the prompt otherwise in training than at
            inference, or there is no token that could end a turn.
    """

    def __init__(self, tokenizer: Any, source: str, stop_tokens: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.source = source
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()  # a tokenizer.json may ask for it, or for padding
        backend.no_padding()
        backend.encode_special_tokens = False
        added = {t.content: t.special for t in tokenizer.added_tokens_decoder.values()}
        self.stop_tokens = [t for t in dict.fromkeys(stop_tokens) if t in added]
        if not self.stop_tokens and tokenizer.eos_token is not None:
            self.stop_tokens = [tokenizer.eos_token]
        self._control = [t for t, special in added.items() if special or t in self.stop_tokens]
        longest_first = sorted(self._control, key=len, reverse=True)
        self._control_pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        nonce = secrets.token_hex(8)
        self._stand_ins = {t: f"\ue000{nonce}.{i}\ue001" for i, t in enumerate(self._control)}
        self._stand_in_pattern = re.compile(f"\ue000{nonce}\\.([0-9]+)\ue001")
        self._aliases = {t: f"\ue002{nonce}.{i}\ue003" for i, t in enumerate(self._control)}
        self._adopt_end_token()

    def _adopt_end_token(self) -> None:
        """Let generation end at the token that ends the template's own turns, whatever the family says."""
        answer = PROBE[-1]["content"]
        rest = self._rendered(PROBE)[1].rpartition(answer)[2]
        ends = self._control_pattern.findall(rest)
        if ends and not set(ends) & set(self.stop_tokens):
            self.stop_tokens.insert(0, ends[0])
        if not self.stop_tokens:
            raise ModelError("the tokenizer has no end-of-sequence token: the model could never stop.")

    def stop_ids(self) -> list[int]:
        """Return the ids at which generation ends."""
        return [self.tokenizer.convert_tokens_to_ids(t) for t in self.stop_tokens]

    def render(self, messages: list[dict[str, str]], *, generation_prompt: bool) -> str:
        """Return the text that the template makes of messages."""
        try:
            return self.tokenizer.apply_chat_template(
                messages, chat_template=self.source, tokenize=False, add_generation_prompt=generation_prompt
            )
        except Exception as error:  # Jinja's errors, and whatever a template raises itself
            raise ModelError(
                f"the chat template cannot render a conversation ({error}). Choose another template_name."
            ) from error

    def prompt_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """Return the tokens that generation starts from: the same that training put before the answer."""
        return self._tokenise(self.render(self._guarded(messages), generation_prompt=True))

    def encode(self, record: Record, max_length: int) -> Row | str:
        """Return a record's tokens and mask, or the reason why it cannot be learned from.

        Learned are the answer's tokens and the token that ends the turn. A row longer than
        `max_length` loses the end of its answer, never all of it.
        """
        prompt, completion = self._texts(record)
        prompt_ids, answer_ids = self._tokenise(prompt), self._continue(completion)
        room = max_length - len(prompt_ids)
        if room < 1:
            return (
                f"its prompt alone has {len(prompt_ids)} tokens, so max_seq_length={max_length} would cut the "
                f"whole answer; raise max_seq_length to {len(prompt_ids) + len(answer_ids)} to use it"
            )
        ids = np.asarray(prompt_ids + answer_ids[:room], dtype=np.int32)
        weights = np.where(np.arange(len(ids)) >= len(prompt_ids), record.weight, 0.0).astype(np.float32)
        return Row(ids, weights, record.category, record.origin, len(prompt_ids) + len(answer_ids))

    def encode_all(self, records: Sequence[Record], max_length: int) -> Encoding:
        """Encode a corpus.

        Errors:
            DataError: no row can be learned from.
        """
        rows, skipped = [], []
        for record in records:
            row = self.encode(record, max_length)
            if isinstance(row, str):
                skipped.append(f"{record.origin}: {row}")
            else:
                rows.append(row)
        if records and not rows:
            raise DataError(f"no row can be learned from. The first of {len(skipped)}: {skipped[0]}")
        return Encoding(MemoryRows(rows), skipped)

    def _texts(self, record: Record) -> tuple[str, str]:
        """Return the prompt and what the model shall say, up to and with the end of its turn."""
        messages = self._guarded(
            [{"role": "user", "content": record.human}, {"role": "assistant", "content": record.assistant}]
        )
        try:
            prompt, completion = self._rendered(messages)
        except ModelError as error:
            raise ModelError(f"{record.origin}: {error}") from error
        answer = messages[-1]["content"]
        answer = answer if answer in completion else answer.strip()  # a template may trim it
        rest = completion.rpartition(answer)[2]  # all of it, when the template changed the answer
        ends = list(self._control_pattern.finditer(rest))
        end = next((m for m in ends if m.group() in self.stop_tokens), ends[0] if ends else None)
        kept = rest[: end.end()] if end else rest.rstrip() + self.stop_tokens[0]
        return prompt, completion[: len(completion) - len(rest)] + kept

    def _rendered(self, messages: list[dict[str, str]]) -> tuple[str, str]:
        """Render a conversation that ends with an answer: what stands before the answer, and what follows."""
        prompt = self.render(messages[:-1], generation_prompt=True)
        whole = self.render(messages, generation_prompt=False)
        if not whole.startswith(prompt):
            raise ModelError(
                "the chat template renders another text before the answer in training than at inference, so what is "
                f"learned would never be asked for. Prompt ends with {prompt[-40:]!r}; choose another template_name."
            )
        return prompt, whole[len(prompt) :]

    def _guarded(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        """Put a stand-in for each control token that is written inside a cell."""
        return [
            m | {"content": self._control_pattern.sub(lambda f: self._stand_ins[f.group()], m["content"])}
            for m in messages
        ]

    def _tokenise(self, text: str) -> list[int]:
        """Tokenise rendered text: its control tokens are the template's, since cells are guarded."""
        if not self._stand_in_pattern.search(text):
            return self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        text = self._control_pattern.sub(lambda f: self._aliases[f.group()], text)
        text = self._stand_in_pattern.sub(lambda f: self._control[int(f.group(1))], text)
        return self._letters_only.encode(text, add_special_tokens=False).ids

    def _continue(self, text: str) -> list[int]:
        """Tokenise what follows a prompt: without the space that some tokenizers put before any text."""
        newline, both = self._tokenise("\n"), self._tokenise("\n" + text)
        if self._adds_space and both[: len(newline)] == newline:
            return both[len(newline) :]
        return self._tokenise(text)

    @cached_property
    def _adds_space(self) -> bool:
        """True for a tokenizer such as Llama 2's, to which a text's first word is another one than a later one."""
        newline, both = self._tokenise("\n"), self._tokenise("\na")
        return both[: len(newline)] == newline and both[len(newline) :] != self._tokenise("a")

    @cached_property
    def _letters_only(self) -> Any:
        """The tokenizer with its control tokens under other names, so that to it their letters are only letters."""
        backend, names = self.tokenizer.backend_tokenizer, self._aliases
        tree = json.loads(backend.to_str()) | {"post_processor": None}
        for token in tree["added_tokens"]:
            if token["content"] in names:
                token |= {"content": names[token["content"]], "normalized": False}
        model = tree["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(t, t): i for t, i in model["vocab"].items()}
        else:
            model["vocab"] = [[names.get(t, t), score] for t, score in model["vocab"]]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        if "merges" in model:
            pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
            model["merges"] = [[a, b] for a, b in pairs if not {a, b, a + b} & names.keys()]
        renamed = type(backend).from_str(json.dumps(tree))
        assert all(renamed.token_to_id(names[t]) == backend.token_to_id(t) for t in names), "control tokens have moved"
        return renamed
