"""Tokenise word by word where that is the same, so that a word is tokenised once.

A byte-level tokenizer first cuts a text by a pattern, then looks at each part alone. In the patterns known
here no match holds something that is not white space and then a space: so before such a space there always
is a cut, whatever stands around, and the text on either side can be tokenised apart. So there is where a line
begins, unless white space stands before or after its line feed: a run of it is cut by what follows.

And the other way round: words that begin with a space, put one after the other, keep their tokens, and cost half
as much as alone. Which are whose is told by their bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np

GAP = re.compile(r"(?<=[!-~])(?= )|(?<=[!-~]\n)(?=[!-~])")
"""Only after ASCII: what else is white space is not the same to all engines."""
WORD, WORDS = 32, 400_000
"""Longer stretches are not kept, and all processes that tokenise keep no more of them than this: some 130 MB."""
JOINS = re.compile(r" [!-/:-~](?:[\x00-\x7f]*[!-~])?\n?")
"""Words between any two of which there is a cut; not before a digit: where those are cut out first, the space stays."""
JOINED = 512
"""Words that are tokenised as one text."""
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


def bytes_of_ids(backend: Any) -> np.ndarray:
    """Return how many bytes of text each id of a byte-level tokenizer stands for."""
    spelled = {number: len(token) for token, number in backend.get_vocab(with_added_tokens=True).items()}
    spelled |= {n: len(t.content.encode("utf-8")) for n, t in backend.get_added_tokens_decoder().items()}
    lengths = np.zeros(max(spelled) + 1, np.int64)
    lengths[list(spelled.keys())] = list(spelled.values())
    return lengths


class Words:
    """Tokens of the words seen so far, of `most` at most; `lengths` are those of `bytes_of_ids`."""

    def __init__(self, lengths: np.ndarray) -> None:
        self._lengths, self.most = lengths, WORDS
        self._known: dict[str, list[int]] = {}

    def tokenise(self, texts: Sequence[str], batch: Batch) -> list[list[int]]:
        """Tokenise texts; `batch` tokenises what was not seen before."""
        known = self._known
        cut = [GAP.split(text) for text in texts]
        new = [word for word in dict.fromkeys(chain.from_iterable(cut)) if word not in known]
        found = self._tokenised(new, batch)
        known.update(found)
        out = [list(chain.from_iterable(map(known.__getitem__, words))) for words in cut]
        for word in found:
            if len(word) > WORD or len(known) > self.most:
                del known[word]
        return out

    def _tokenised(self, words: Sequence[str], batch: Batch) -> dict[str, list[int]]:
        """Tokenise words: those between which there would be a cut as one text, which costs half as much."""
        found: dict[str, list[int]] = {}
        can_join = [word for word in words if JOINS.fullmatch(word)]
        groups = [can_join[at : at + JOINED] for at in range(0, len(can_join), JOINED)]
        for group, ids in zip(groups, batch(["".join(group) for group in groups]), strict=True):
            ends = np.cumsum([len(word) for word in group])  # in bytes: the letters are ASCII
            reached = np.cumsum(self._lengths[ids])
            last = np.searchsorted(reached, ends)
            if len(ids) == last[-1] + 1 and np.array_equal(reached[last], ends):  # else some byte has no token
                places = [0, *(last + 1).tolist()]
                found |= {word: ids[a:b] for word, a, b in zip(group, places, places[1:], strict=False)}
        alone = [word for word in words if word not in found]
        return found | dict(zip(alone, batch(alone), strict=True))
