"""Tokenise word by word where that is the same, so that a word is tokenised once.

A byte-level tokenizer first cuts a text by a pattern, then looks at each part alone. In the patterns known
here no match holds something that is not white space and then a space: so before such a space there always
is a cut, whatever stands around, and the text on either side can be tokenised apart.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

GAP = re.compile(r"(?<=[!-~])(?= )")
"""Only after ASCII: what else is white space is not the same to all engines."""
WORD, WORDS = 32, 400_000
"""Longer stretches are not kept, and no more of them than this."""
LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {LETTERS + r"\p{N}" + REST, LETTERS + r"\p{N}{1,3}" + REST}
"""Qwen2's and later ones', and Llama 3's; GPT-2's own is the byte-level step's."""
Batch = Callable[[Sequence[str]], list[list[int]]]


def reads_words(backend: Any) -> bool:
    """True when a tokenizer is known to cut a text before each space that follows a visible ASCII letter."""
    tree = json.loads(backend.to_str())
    model, normalizer = tree["model"], tree.get("normalizer")
    if model.get("type") != "BPE" or any(model.get(k) for k in ("dropout", "byte_fallback", "unk_token")):
        return False
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return False
    if normalizer is not None and normalizer != {"type": "NFC"}:
        return False
    if any(" " in t["content"] or t["single_word"] or t["lstrip"] or t["rstrip"] for t in tree["added_tokens"]):
        return False
    return _cuts(tree.get("pre_tokenizer"))


def _cuts(step: dict[str, Any] | None) -> bool:
    """True when the last cut is by a known pattern, and what comes before it only cuts out digits or nothing."""
    steps = step.get("pretokenizers", [step]) if step else []
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return False
    if steps[-1].get("use_regex", True):  # GPT-2's own pattern
        return all(s.get("type") == "Digits" for s in steps[:-1])
    (first, *others) = steps[:-1] or [{}]
    pattern = first.get("pattern", {})
    return (
        first.get("type") == "Split"
        and first.get("behavior") == "Isolated"
        and not first.get("invert")
        and isinstance(pattern, dict)
        and pattern.get("Regex") in PATTERNS
        and not others
    )


class Words:
    """Tokens of the words seen so far."""

    def __init__(self) -> None:
        self._known: dict[str, list[int]] = {}

    def tokenise(self, texts: Sequence[str], batch: Batch) -> list[list[int]]:
        """Tokenise texts; `batch` tokenises what was not seen before."""
        known = self._known
        cut = [GAP.split(text) for text in texts]
        new = list({word: None for words in cut for word in words if word not in known})
        once: dict[str, list[int]] = {}
        for word, ids in zip(new, batch(new), strict=True):
            (known if len(word) <= WORD and len(known) < WORDS else once)[word] = ids
        if not once:
            return [list(chain.from_iterable(map(known.__getitem__, words))) for words in cut]
        return [list(chain.from_iterable([known[w] if w in known else once[w] for w in words])) for words in cut]
