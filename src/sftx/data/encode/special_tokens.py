"""Text to tokens, with special tokens and the same text in a cell kept apart.

Two spellings do it, both with a random part that no text can hold: while the template renders, a special
token inside a cell has a placeholder; and where there was one, the text is tokenised by a copy of the
tokenizer in which the true special tokens have other names.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from sftx.errors import ModelError

BATCH_CHARACTERS = 1 << 14
"""Characters tokenised at once: what the tokenizer returns for a text is a hundred times its size, and should stay in
the processor's cache until its ids are taken out."""
THINKING = re.compile(r"(\s*<think>)(.*?)(</think>)(.*)", re.DOTALL)
"""Thinking written inside an answer's own text: what opens it, the thought, what closes it, the rest."""


class SpecialTokens:
    """Tokenises rendered text for one tokenizer."""

    def __init__(self, tokenizer: Any, stop_tokens: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.backend = tokenizer.backend_tokenizer
        self.backend.no_truncation()  # a tokenizer.json may ask for it, or for padding
        self.backend.no_padding()
        self.backend.encode_special_tokens = False
        added = tokenizer.added_tokens_decoder.values()
        self.names = [t.content for t in added if t.special or t.content in stop_tokens]
        self.pattern = _any_of(self.names)
        self.cuts = _any_of([t.content for t in added if t.content in set(self.names) and not t.single_word])
        self.swallowing = {t.content for t in added if t.rstrip}
        self._first_characters = {t[0] for t in self.names}
        nonce = secrets.token_hex(8)
        self._nonce = nonce
        self._placeholders = {t: f"\ue000{nonce}.{i}\ue001" for i, t in enumerate(self.names)}
        self._placeholder_pattern = re.compile(f"\ue000{nonce}\\.([0-9]+)\ue001")
        self._aliases = {t: f"\ue002{nonce}.{i}\ue003" for i, t in enumerate(self.names)}

    def escape(self, text: str) -> str:
        """Put a placeholder for each special token that is written in a cell."""
        if not any(character in text for character in self._first_characters):
            return text
        return self.pattern.sub(lambda f: self._placeholders[f.group()], text)

    def escape_answer(self, text: str) -> str:
        """Escape an assistant's text, except the tags of the thinking it begins with: these the model itself writes."""
        found = THINKING.match(text) if "<think>" in self._placeholders else None
        if not found:
            return self.escape(text)
        opening, thought, close, rest = found.groups()
        return opening + self.escape(thought) + close + self.escape(rest)

    def escape_all(self, value: Any) -> Any:
        """Escape every text inside plain data, such as a tool's definition."""
        if isinstance(value, str):
            return self.escape(value)
        if isinstance(value, dict):
            return {key: self.escape_all(item) for key, item in value.items()}
        return [self.escape_all(item) for item in value] if isinstance(value, list | tuple) else value

    def tokenise(self, text: str) -> list[int]:
        """Tokenise rendered text: its special tokens are the template's, since cells are escaped."""
        return self.tokenise_all([text])[0]

    def tokenise_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenise many rendered texts."""
        escaped = [i for i, text in enumerate(texts) if self._nonce in text]
        if not escaped:
            return _encoded(self.backend, texts)
        out = _encoded(self.backend, ["" if self._nonce in text else text for text in texts])
        plain = _encoded(self.plain_tokenizer, [self._plain_spelling(texts[i]) for i in escaped])
        for i, ids in zip(escaped, plain, strict=True):
            out[i] = ids
        return out

    def _plain_spelling(self, text: str) -> str:
        """Return the spelling that `plain_tokenizer` reads: special tokens renamed, placeholders undone."""
        text = self.pattern.sub(lambda f: self._aliases[f.group()], text)
        text = self._placeholder_pattern.sub(lambda f: self.names[int(f.group(1))], text)
        if "\ue000" + self._nonce in text:
            raise ModelError(
                "the chat template takes apart a special token that stands in a cell; choose another template_name."
            )
        return text

    def tokenise_continuation(self, text: str) -> list[int]:
        """Tokenise what follows a prompt: without the space that some tokenizers put before any text."""
        newline, both = self.tokenise("\n"), self.tokenise("\n" + text)
        if self._adds_space and both[: len(newline)] == newline:
            return both[len(newline) :]
        return self.tokenise(text)

    def ends(self, parts: Sequence[str]) -> tuple[list[int], list[tuple[int, int]], list[int]]:
        """Tokenise parts as one text; return the ids, where each token lies in it, and where each part ends."""
        spelled = [self._plain_spelling(part) for part in parts]
        found = self.plain_tokenizer.encode("".join(spelled), add_special_tokens=False)
        ends = [sum(map(len, spelled[: i + 1])) for i in range(len(spelled))]
        return found.ids, found.offsets, ends

    @cached_property
    def _adds_space(self) -> bool:
        """True for a tokenizer such as Llama 2's, to which a text's first word is another one than a later one."""
        newline, both = self.tokenise("\n"), self.tokenise("\na")
        return both[: len(newline)] == newline and both[len(newline) :] != self.tokenise("a")

    @cached_property
    def plain_tokenizer(self) -> Any:
        """The tokenizer with its special tokens under other names: their own names are plain text to it."""
        names = self._aliases
        tree = json.loads(self.backend.to_str()) | {"post_processor": None}
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
        renamed = type(self.backend).from_str(json.dumps(tree))
        same = all(renamed.token_to_id(names[t]) == self.backend.token_to_id(t) for t in names)
        assert same, "special tokens have moved"
        return renamed


def _encoded(backend: Any, texts: Sequence[str]) -> list[list[int]]:
    out: list[list[int]] = []
    start = 0
    while start < len(texts):
        stop, characters = start, 0
        while stop < len(texts) and characters < BATCH_CHARACTERS:
            characters += len(texts[stop])
            stop += 1
        out += [e.ids for e in backend.encode_batch_fast(texts[start:stop], add_special_tokens=False)]
        start = stop
    return out


def _any_of(words: Sequence[str]) -> re.Pattern[str]:
    """Return a pattern for the longest of the words, as a trie: ten times faster for the 6,000 of Gemma."""
    tree: dict[str, Any] = {}
    for word in words:
        node = tree
        for character in word:
            node = node.setdefault(character, {})
        node[""] = {}

    def spelled(node: dict[str, Any]) -> str:
        branches = [re.escape(character) + spelled(rest) for character, rest in node.items() if character]
        if not branches:
            return ""
        body = f"(?:{'|'.join(branches)})" if len(branches) > 1 or "" in node else branches[0]
        return body + "?" if "" in node else body

    return re.compile(spelled(tree) or r"(?!)")
