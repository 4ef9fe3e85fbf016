"""What becomes of a record that is too long."""

from __future__ import annotations

import pytest
from tests.unit.test_template import QWEN_STOPS, byte_tokenizer, template_source
from tests.unit.test_template_families import template_of
from tests.unit.test_template_turns import rows_of, said, system, talk

from sftx.data.encode.policy import EncodePolicy, TooLong
from sftx.data.encode.row import Row
from sftx.data.encode.template import ChatTemplate
from sftx.data.records.record import Message
from sftx.errors import DataError

CHATML = ChatTemplate(
    byte_tokenizer("<|im_start|>", "<|im_end|>", eos_token="<|im_end|>"), template_source("chatml"), QWEN_STOPS
)
"""A token for each letter: `<|im_start|>user\\n...<|im_end|>\\n` are 8 tokens around the text, an answer's prompt is 11."""


def policy(too_long: TooLong, length: int) -> EncodePolicy:
    return EncodePolicy(length, too_long)


def texts(rows: list[Row]) -> list[tuple[str, str]]:
    """Return each row's text, and what is learned of it."""
    decode = CHATML.tokenizer.decode
    return [(decode(r.ids_T), decode(r.ids_T[r.supervised_T])) for r in rows]


def turns(*said: str) -> str:
    return "".join(f"<|im_start|>{('user', 'assistant')[i % 2]}\n{t}<|im_end|>\n" for i, t in enumerate(said))[:-1]


LONG = talk("u" * 10, "a" * 10, "v" * 10, "b" * 10)


def test_every_policy_leaves_what_fits_as_it_is() -> None:
    full = len(rows_of(CHATML, LONG)[0].ids_T)
    for too_long in ("truncate_right", "truncate_prompt", "drop", "split", "error"):
        (row,) = rows_of(CHATML, LONG, policy(too_long, full))  # type: ignore[arg-type]
        assert (len(row.ids_T), row.truncated) == (full, False)
        assert rows_of(CHATML, LONG, policy(too_long, full))[0].ids_T.tolist() == row.ids_T.tolist()  # type: ignore[arg-type]


def test_truncate_right_keeps_some_of_the_last_answer_or_says_so() -> None:
    full = len(rows_of(CHATML, LONG)[0].ids_T)
    (row,) = rows_of(CHATML, LONG, policy("truncate_right", full - 10))
    assert texts([row])[0][1] == "a" * 10 + "<|im_end|>b"
    assert (row.truncated, row.full_length) == (True, full)


def test_truncate_right_ends_after_the_last_whole_answer_when_the_last_one_is_beyond_the_limit() -> None:
    full, first = (len(rows_of(CHATML, record)[0].ids_T) for record in (LONG, talk("u" * 10, "a" * 10)))
    for length in (full - 11, full - 20, first):
        (row,) = rows_of(CHATML, LONG, policy("truncate_right", length))
        assert texts([row]) == [(turns("u" * 10, "a" * 10), "a" * 10 + "<|im_end|>")]
        assert (row.truncated, row.full_length) == (True, full)
    (row,) = rows_of(CHATML, LONG, policy("truncate_right", first - 1))  # no whole answer fits: the first is cut
    assert texts([row])[0][1] == "a" * 10
    found = CHATML.encode(LONG, policy("truncate_right", first - 11))
    assert f"{first - 11} prompt tokens leave no room for its first answer" in str(found)
    assert f"raise max_seq_length to {full} " in str(found)
    assert isinstance(CHATML.encode(LONG, EncodePolicy(full - 11, "truncate_right", "last")), str)


def test_truncate_right_leaves_out_the_rows_beyond_the_limit_and_says_so_of_one_that_stays() -> None:
    """Where a template has a row for each answer."""
    template = template_of("qwen3")
    record = talk("u", "a", "v", "b", "w" * 99, "c")
    lengths = [len(row.ids_T) for row in rows_of(template, record)]
    rows = rows_of(template, record, policy("truncate_right", 80))
    decode = template.tokenizer.decode
    assert [decode(row.ids_T[row.supervised_T]) for row in rows] == ["a<|im_end|>", "b<|im_end|>"]
    assert [(row.truncated, row.full_length) for row in rows] == [(False, lengths[0]), (True, lengths[2])]


def test_drop_leaves_out_and_names_the_length() -> None:
    full = len(rows_of(CHATML, LONG)[0].ids_T)
    left_out, kept = CHATML.encode_batch([LONG, talk("a", "b")], policy("drop", full - 1))
    assert len(kept) == 1
    assert left_out == (
        f"it has {full} tokens, more than max_seq_length={full - 1}, and too_long=drop leaves it out; "
        f"raise max_seq_length to {full} to use it"
    )


def test_error_names_file_and_line() -> None:
    with pytest.raises(DataError, match=r"corpus\.jsonl:3: it has \d+ tokens.*max_seq_length=50.*truncate_right"):
        CHATML.encode_batch([talk("a", "b"), LONG], policy("error", 50))


# The beginning of the prompt


def test_truncate_prompt_drops_the_oldest_exchanges_first() -> None:
    record = talk(
        system("S"),
        Message("user", "u" * 9),
        said("a" * 9),
        Message("user", "v"),
        said("b"),
        Message("user", "w"),
        said("c"),
    )
    first = "<|im_start|>system\nS<|im_end|>\n"
    full = len(rows_of(CHATML, record)[0].ids_T)
    (row,) = rows_of(CHATML, record, policy("truncate_prompt", full - 1))
    assert texts([row]) == [(first + turns("v", "b", "w", "c"), "b<|im_end|>c<|im_end|>")]
    assert row.full_length == full
    (row,) = rows_of(CHATML, record, policy("truncate_prompt", len(row.ids_T) - 1))
    assert texts([row]) == [(first + turns("w", "c"), "c<|im_end|>")]


def test_truncate_prompt_then_cuts_the_beginning_of_the_question() -> None:
    record = talk(system("S"), Message("user", "0123456789" * 5), said("answer"))
    full = len(rows_of(CHATML, record)[0].ids_T)
    for length in (full - 1, full - 7, full - 49):
        (row,) = rows_of(CHATML, record, policy("truncate_prompt", length))
        assert len(row.ids_T) == length
        cut = ("0123456789" * 5)[full - length :]
        assert texts([row]) == [("<|im_start|>system\nS<|im_end|>\n" + turns(cut, "answer"), "answer<|im_end|>")]
    found = CHATML.encode(record, policy("truncate_prompt", full - 50))
    assert f"its last answer and the template around it have {full - 49} tokens" in str(found)


def test_truncate_prompt_keeps_calls_and_their_results() -> None:
    record = talk("q" * 30, said("x"), Message("tool", "t" * 9), said("y"))
    full = len(rows_of(CHATML, record)[0].ids_T)
    ((text, learned),) = texts(rows_of(CHATML, record, policy("truncate_prompt", full - 12)))
    assert text.startswith("<|im_start|>user\n" + "q" * 18 + "<|im_end|>")
    assert learned == "x<|im_end|>y<|im_end|>"


def test_truncate_prompt_cuts_each_row_of_a_template_that_has_one_for_each_turn() -> None:
    rows = rows_of(template_of("qwen3"), talk("u" * 30, "a", "v", "b"), policy("truncate_prompt", 60))
    decode = template_of("qwen3").tokenizer.decode
    assert [decode(r.ids_T[r.supervised_T]) for r in rows] == ["a<|im_end|>", "b<|im_end|>"]
    assert (
        decode(rows[1].ids_T)
        == "<|im_start|>user\nv<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nb<|im_end|>"
    )
    assert all(len(r.ids_T) <= 60 for r in rows)
    assert decode(rows[0].ids_T).count("u") < 32


# Several rows


def test_split_cuts_a_conversation_before_questions() -> None:
    record = talk(system("S"), *(m for i in range(5) for m in (Message("user", f"u{i}"), said(f"a{i}"))))  # type: ignore[misc]
    first = "<|im_start|>system\nS<|im_end|>\n"
    two = len(CHATML.prompt_ids([{"role": "system", "content": "S"}])) - 11 + 2 * (8 + 2 + 13 + 2)
    rows = rows_of(CHATML, record, policy("split", two))
    assert texts(rows) == [
        (first + turns("u0", "a0", "u1", "a1"), "a0<|im_end|>a1<|im_end|>"),
        (first + turns("u2", "a2", "u3", "a3"), "a2<|im_end|>a3<|im_end|>"),
        (first + turns("u4", "a4"), "a4<|im_end|>"),
    ]


def test_split_leaves_out_rows_where_nothing_is_learned() -> None:
    rows = CHATML.encode(LONG, EncodePolicy(50, "split", "last"))
    assert isinstance(rows, list)
    assert texts(rows) == [(turns("v" * 10, "b" * 10), "b" * 10 + "<|im_end|>")]


@pytest.mark.parametrize("length", [30, 40, 57, 64, 100])
@pytest.mark.parametrize("question", ["q", "q" * 40])
def test_split_learns_each_token_of_a_long_answer_once_and_after_what_came_before(length: int, question: str) -> None:
    answer = "".join(chr(ord("a") + i % 26) for i in range(150))
    rows = rows_of(CHATML, talk(question, answer), policy("split", length))
    assert "".join(learned for _, learned in texts(rows)) == answer + "<|im_end|>"
    assert all(len(r.ids_T) <= length for r in rows)
    prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    kept = len(CHATML.tokenizer(prompt).input_ids) <= length // 2
    done = ""
    for i, (text, learned) in enumerate(texts(rows)):
        if kept:
            assert text.startswith(prompt)
        shown = text.removesuffix(learned).removeprefix(prompt if kept else "")
        assert (prompt + done).endswith(shown)
        assert i == 0 or shown, "an answer is not begun in its middle"
        done += learned


def test_split_keeps_weights() -> None:
    record = talk("u" * 10, said("a" * 10, weight=0.5), "v" * 10, said("b" * 10), weight=2.0)
    first, second = rows_of(CHATML, record, policy("split", 50))
    assert {*first.weights_T.tolist(), *second.weights_T.tolist()} == {0.0, 1.0, 2.0}
    assert first.loss_weight == 11.0
    assert second.loss_weight == 22.0


def test_a_corpus_of_several_rows_for_a_record() -> None:
    found = CHATML.encode_batch([LONG, talk("a", "b")], policy("split", 50))
    assert [[r.origin for r in rows] for rows in found] == [["corpus.jsonl:3"] * 2, ["corpus.jsonl:3"]]
