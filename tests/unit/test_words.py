"""`sftx.data.words`: word by word gives the tokens of the whole."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from tests.unit.test_template import sentencepiece_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers
from transformers import AutoTokenizer

from sftx.data.words import GAP, JOINS, PATTERNS, Words, bytes_of_ids, reads_words
from sftx.model.builtin import ensure_builtin

LETTERS = [
    *"aAbz'sST.,!?;:(){}<>\"\\/_-+=*#@ 0179",
    " ",
    "  ",
    "   ",
    "\n",
    "\r\n",
    "\t",
    "\x1c",
    "\x85",
    "\xa0",
    "\u2028",
]
LETTERS += [
    "\u3000",
    "é",
    "e\u0301",
    "\u0301",
    "你",
    "。",
    "😀",
    "the",
    " and",
    "def ",
    "'ll",
    "<|im_end|>",
    "ａ",
    "\u200d",
    "\x00",
]


def backend(step: Any) -> Tokenizer:
    """Return the embedded model's tokenizer with another first step."""
    made = Tokenizer.from_str(AutoTokenizer.from_pretrained(ensure_builtin()).backend_tokenizer.to_str())
    made.pre_tokenizer = step
    return made


def bytes_after(pattern: str) -> Any:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
SMOL = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2])
STEPS = [*map(bytes_after, sorted(PATTERNS)), GPT2, SMOL]


@pytest.mark.parametrize("step", STEPS)
def test_words_have_the_tokens_of_the_whole(step: Any) -> None:
    whole, rng = backend(step), random.Random(3)
    words = Words(bytes_of_ids(whole))
    assert reads_words(whole)
    batch = lambda texts: [e.ids for e in whole.encode_batch_fast(list(texts), add_special_tokens=False)]  # noqa: E731
    for _ in range(40):
        texts = ["".join(rng.choices(LETTERS, k=rng.randint(0, 40))) for _ in range(100)]
        assert words.tokenise(texts, batch) == batch(texts)


def test_a_word_is_tokenised_once() -> None:
    seen: list[str] = []
    whole = backend(GPT2)
    words = Words(bytes_of_ids(whole))

    def batch(texts: Any) -> list[list[int]]:
        seen.extend(texts)
        return [e.ids for e in whole.encode_batch(list(texts))]

    words.tokenise(["a b a b a", "b a é"], batch)
    words.tokenise(["a b é"], batch)
    assert sorted(seen) == [" b a", " é", "a", "b"]


@pytest.mark.parametrize("step", STEPS)
def test_what_is_tokenised_as_one_text_can_be_cut(step: Any) -> None:
    tree, rng = json.loads(backend(step).to_str()), random.Random(5)
    vocab, merges = tree["model"]["vocab"], tree["model"]["merges"]
    vocab["ĊĠ"] = vocab.pop("".join(merges.pop()))  # a line feed and a space as one token, as SmolLM2 has it
    merges.insert(0, ["Ċ", "Ġ"])
    whole = Tokenizer.from_str(json.dumps(tree))
    ends = ["", ".", "\nb", ";\nb", "\n\n    x", "\t1", "'s", "<|im_end|>\nb", "12", "  .", "e\r\ny"]
    words = [f" {rng.choice('ax(<179')}{rng.choice(LETTERS[:20])}{rng.choice(ends)}" for _ in range(300)]
    seen: list[str] = []

    def batch(texts: Any) -> list[list[int]]:
        seen.extend(texts)
        return [e.ids for e in whole.encode_batch_fast(list(texts), add_special_tokens=False)]

    texts = ["".join(rng.sample(words, 20)) for _ in range(50)]
    assert Words(bytes_of_ids(whole)).tokenise(texts, batch) == batch(texts)
    alone = {w for text in texts for w in GAP.split(text) if not JOINS.fullmatch(w)}
    assert len(seen) <= len(alone) + 1 + len(texts), "a joined text was tokenised again word by word"


def test_words_of_which_a_byte_has_no_token_are_tokenised_alone() -> None:
    tree = json.loads(backend(GPT2).to_str())
    tree["model"]["merges"] = []
    tree["model"]["vocab"] = {t: n for t, n in tree["model"]["vocab"].items() if len(t) == 1 and t != "q"}
    whole = Tokenizer.from_str(json.dumps(tree))
    batch = lambda texts: [e.ids for e in whole.encode_batch_fast(list(texts), add_special_tokens=False)]  # noqa: E731
    texts = ["a b qb q c", "c q", "a b c", " qq"]
    assert reads_words(whole)
    assert Words(bytes_of_ids(whole)).tokenise(texts, batch) == batch(texts)


@pytest.mark.parametrize(
    "step",
    [
        None,
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Metaspace(),
        pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), GPT2]),
        bytes_after(r"\w+ \w+|."),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
)
def test_other_first_steps_are_not_trusted(step: Any) -> None:
    assert not reads_words(backend(step) if step else sentencepiece_tokenizer("<s>", "</s>").backend_tokenizer)


@pytest.mark.parametrize(
    "token",
    [
        AddedToken("<x>", rstrip=True),
        AddedToken("<x>", lstrip=True),
        AddedToken("a b"),
        AddedToken("w", single_word=True),
    ],
)
def test_added_tokens_that_look_at_spaces_are_not_trusted(token: AddedToken) -> None:
    made = backend(GPT2)
    made.add_tokens([token])
    assert not reads_words(made)


def test_models_that_look_beyond_a_word_are_not_trusted() -> None:
    for change in ({"dropout": 0.5}, {"end_of_word_suffix": "</w>"}, {"continuing_subword_prefix": "##"}):
        tree = json.loads(backend(GPT2).to_str())
        tree["model"] |= change
        if change.get("continuing_subword_prefix"):
            tree["model"]["merges"] = []
        assert not reads_words(Tokenizer.from_str(json.dumps(tree)))
