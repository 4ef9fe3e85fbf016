"""Conversations of several turns: what is learned of them, thinking, tools, marks, and batches."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from tests.unit.test_template import QWEN_STOPS, byte_tokenizer, qwen, sentencepiece_tokenizer
from tests.unit.test_template_families import spans, template_of
from tokenizers import AddedToken
from transformers import AutoTokenizer

from sftx.data.encode.policy import EncodePolicy
from sftx.data.encode.row import Row
from sftx.data.encode.template import ChatTemplate, template_source
from sftx.data.records.record import Message, Record
from sftx.errors import ModelError
from sftx.model.loading.builtin import ensure_builtin

ROOM = EncodePolicy(10_000)
LAST = EncodePolicy(10_000, train_on="last")
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "北京"}'}}


def talk(*turns: str | Message, **options: Any) -> Record:
    """Return a conversation: texts of the user and the assistant in turn, or messages as they are."""
    roles = ("user", "assistant")
    made = [t if isinstance(t, Message) else Message(roles[i % 2], t) for i, t in enumerate(turns)]  # type: ignore[arg-type]
    return Record(tuple(made), "c", "corpus.jsonl", 3, {}, **options)


def rows_of(template: ChatTemplate, record: Record, policy: EncodePolicy = ROOM) -> list[Row]:
    rows = template.encode(record, policy)
    assert isinstance(rows, list), rows
    return rows


def learned(template: ChatTemplate, record: Record, policy: EncodePolicy = ROOM) -> list[str]:
    """Return what is learned, row by row."""
    return [template.tokenizer.decode(r.ids_T[r.supervised_T]) for r in rows_of(template, record, policy)]


def system(text: str) -> Message:
    return Message("system", text)


def said(text: str, **options: Any) -> Message:
    return Message("assistant", text, **options)


# Which turns


def test_all_turns_or_the_last() -> None:
    record = talk("a", "b", "c", "d", "e", "f")
    assert learned(qwen(), record) == ["b<|im_end|>d<|im_end|>f<|im_end|>"]
    assert learned(qwen(), record, LAST) == ["f<|im_end|>"]
    assert rows_of(qwen(), record)[0].ids_T.tolist() == rows_of(qwen(), record, LAST)[0].ids_T.tolist()


def test_what_follows_the_last_learned_turn_is_left_out() -> None:
    assert spans(qwen(), talk("a", "b", "c"))[0][-1] == "b<|im_end|>"
    assert spans(qwen(), talk("a", "b", "c", said("d", weight=0)))[0][-1] == "b<|im_end|>"


def test_a_turns_weight_has_the_last_word() -> None:
    record = talk("a", said("b", weight=0.5), "c", said("d", weight=0), "e", "f", weight=2.0)
    (row,) = rows_of(qwen(), record)
    by_weight = {w: qwen().tokenizer.decode(row.ids_T[row.weights_T == w]) for w in (1.0, 2.0)}
    assert by_weight == {1.0: "b<|im_end|>", 2.0: "f<|im_end|>"}
    assert set(row.weights_T.tolist()) == {0.0, 1.0, 2.0}
    assert learned(qwen(), talk("a", said("b", weight=1), "c", "d"), LAST) == ["b<|im_end|>d<|im_end|>"]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (talk("a", said("b", weight=0)), "none of its turns is supervised"),
        (talk("a", "b", weight=0.0), "none of its turns is supervised"),
        (talk("a"), "none of its turns is supervised"),
        (talk(said("b"), Message("user", "c")), "begins with an answer"),
    ],
)
def test_a_record_without_anything_to_learn_says_why(record: Record, reason: str) -> None:
    assert reason in str(qwen().encode(record, ROOM))
    assert reason in str(qwen().encode_batch([record], ROOM)[0])


# The prompt of each


def test_an_answer_that_melts_into_its_prompt_ends_a_row() -> None:
    """At inference the next prompt is tokenised whole: there a newline before and one of the answer's are one token."""
    special = [AddedToken(t, normalized=False) for t in ("<|im_start|>", "<|im_end|>")]
    tokenizer = byte_tokenizer(*special, eos_token="<|im_end|>")
    tree = tokenizer.backend_tokenizer
    from tokenizers import Tokenizer, models

    vocab = tree.get_vocab(with_added_tokens=False)
    merged = Tokenizer(models.BPE(vocab=vocab | {"ĊĊ": 999}, merges=[("Ċ", "Ċ")]))
    merged.pre_tokenizer, merged.decoder = tree.pre_tokenizer, tree.decoder
    merged.add_special_tokens(special)
    tokenizer = type(tokenizer)(tokenizer_object=merged, eos_token="<|im_end|>")
    template = ChatTemplate(tokenizer, template_source("chatml"), QWEN_STOPS)
    record = talk("a", "\nb", "c", "d")
    first, second = rows_of(template, record)
    messages = [{"role": m.role, "content": m.content} for m in record.messages]
    assert first.ids_T[~first.supervised_T].tolist() == template.prompt_ids(messages[:1])
    assert second.ids_T[~second.supervised_T].tolist() == template.prompt_ids(messages[:3])
    assert [template.tokenizer.decode(r.ids_T[r.supervised_T]) for r in (first, second)] == [
        "\nb<|im_end|>",
        "d<|im_end|>",
    ]


def test_later_turns_of_a_tokenizer_that_adds_spaces_are_tokenised_as_in_the_whole() -> None:
    tokenizer = sentencepiece_tokenizer("<s>", "</s>")
    template = ChatTemplate(tokenizer, template_source("mistral"), ["</s>"])
    (row,) = rows_of(template, talk("h", "An a", "a", "An"))
    whole = "<s> [INST] h [/INST] An a</s> [INST] a [/INST] An</s>"
    assert row.ids_T.tolist() == tokenizer(whole, add_special_tokens=False).input_ids
    assert tokenizer.convert_ids_to_tokens(row.ids_T[row.supervised_T]) == ["▁An", "▁a", "</s>", "▁An", "</s>"]


def test_control_text_in_any_turn_stays_letters() -> None:
    record = talk(
        system("<|im_end|>s"), Message("user", "<|im_start|>"), said("<|im_end|>b"), Message("user", "c"), said("d")
    )
    (row,) = rows_of(qwen(), record)
    end = qwen().tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert row.ids_T.tolist().count(end) == 5
    assert learned(qwen(), record) == ["<|im_end|>b<|im_end|>d<|im_end|>"]


# Thinking

Q = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
NO_THOUGHT = "<think>\n\n</think>\n\n"


def test_qwen3_learns_each_turn_after_what_inference_shows_of_the_earlier() -> None:
    """Its template leaves the thinking of earlier answers out: one rendering of all would teach what is never asked."""
    record = talk("a", said("b", reasoning="r1"), "c", said("d", reasoning="r2"), "e", "f")
    history = [Q.format("a") + "b<|im_end|>\n", Q.format("c") + "d<|im_end|>\n"]
    assert spans(template_of("qwen3"), record) == [
        [Q.format("a"), "<think>\nr1\n</think>\n\nb<|im_end|>"],
        [history[0] + Q.format("c"), "<think>\nr2\n</think>\n\nd<|im_end|>"],
        [history[0] + history[1] + Q.format("e") + NO_THOUGHT, "f<|im_end|>"],
    ]
    assert learned(template_of("qwen3"), record, LAST) == ["f<|im_end|>"]


def test_without_thinking_the_empty_block_is_the_prompts() -> None:
    """As inference with enable_thinking=False renders it; with thinking on, the thinking is learned."""
    template = template_of("qwen3")
    (row,) = rows_of(template, talk("a", "b"))
    asked = [{"role": "user", "content": "a"}]
    assert row.ids_T[~row.supervised_T].tolist() == template.prompt_ids(asked, thinking=False)
    (row,) = rows_of(template, talk("a", said("b", reasoning="r")))
    assert row.ids_T[~row.supervised_T].tolist() == template.prompt_ids(asked, thinking=True)
    assert template.prompt_ids(asked) == template.prompt_ids(asked, thinking=True)


def test_the_switch_for_thinking_is_read_from_the_rows() -> None:
    """So that a prompt after training is the one that training showed."""
    template = template_of("qwen3")
    plain = [r for t in (talk("a", "b", "c", "d"), talk(Message("user", "a"), said("b"))) for r in rows_of(template, t)]
    thought = [r for t in ("a", "longer") for r in rows_of(template, talk(t, said("b", reasoning="r")))]
    assert template.thinking_of(plain) is False
    assert template.thinking_of(thought) is True
    assert template.thinking_of([*plain, *thought]) is None
    assert template_of("qwen2_5").thinking_of(rows_of(template_of("qwen2_5"), talk("a", "b"))) is None


def test_thinking_inside_the_text_is_thinking() -> None:
    inline = talk("a", "<think>\nr\n</think>\n\nb")
    assert spans(template_of("qwen3"), inline) == spans(template_of("qwen3"), talk("a", said("b", reasoning="r")))


def test_a_template_without_a_place_for_thinking_gets_it_before_the_answer() -> None:
    assert learned(qwen(), talk("a", said("b", reasoning="r"))) == ["<think>\nr\n</think>\n\nb<|im_end|>"]


def test_a_prompt_that_opens_the_thinking_is_followed_by_it() -> None:
    """DeepSeek-R1's template leaves thinking out of every answer, and begins it in the prompt."""
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|go|>{{ m.content.split('</think>')[-1] }}<|end|>"
        "{% else %}<|you|>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|go|><think>\n{% endif %}"
    )
    template = ChatTemplate(byte_tokenizer("<|go|>", "<|you|>", "<|end|>", eos_token="<|end|>"), source, [])
    for record in (talk("a", "<think>\nr\n</think>\n\nb"), talk("a", "<think>r</think>\n\nb")):
        assert spans(template, record) == [["<|you|>a<|go|><think>\n", "r\n</think>\n\nb<|end|>"]]


# Tools


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3"])
def test_calls_are_learned_and_their_results_are_not(name: str) -> None:
    record = talk(
        "weather?",
        said("", tool_calls=(CALL,)),
        Message("tool", "sunny", name="weather"),
        said("It is sunny."),
        tools=(WEATHER,),
    )
    template = template_of(name)
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call><|im_end|>'
    texts = spans(template, record)
    result = "\n<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    tools = (
        "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function "
        "signatures within <tools></tools> XML tags:\n<tools>\n"
        '{"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}\n</tools>\n\n'
        "For each function call, return a json object with function name and arguments within <tool_call></tool_call> "
        'XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
    )
    if name == "qwen2_5":
        start = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
        prompt = start + tools + "<|im_start|>user\nweather?<|im_end|>\n<|im_start|>assistant"
        assert texts == [[prompt + "\n", call, result, "It is sunny.<|im_end|>"]]
    else:  # no thinking: an empty block before each answer, which an earlier one does not keep
        prompt = "<|im_start|>system\n" + tools.lstrip("\n") + Q.format("weather?")
        assert texts == [
            [prompt + NO_THOUGHT, call],
            [prompt + call + result + NO_THOUGHT, "It is sunny.<|im_end|>"],
        ]


def test_a_template_that_writes_arguments_as_they_are_gets_text() -> None:
    source = (
        "{% for m in messages %}<|go|>{{ m.role }}{% for t in tools or [] %}{{ t.function.name }}{% endfor %}:{{ m.content }}"
        "{% for c in m.tool_calls %}{{ c.function.name + c.function.arguments }}{% endfor %}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|go|>assistant{% for t in tools or [] %}{{ t.function.name }}{% endfor %}:{% endif %}"
    )
    template = ChatTemplate(byte_tokenizer("<|go|>", "<|end|>", eos_token="<|end|>"), source, [])
    record = talk("?", said("", tool_calls=(CALL,)), tools=(WEATHER,))
    assert learned(template, record) == ['weather{"city": "北京"}<|end|>']


def test_a_template_without_a_place_for_tools_is_refused() -> None:
    with pytest.raises(ModelError, match=r"corpus\.jsonl:3: .*`tools`.*qwen2_5"):
        qwen().encode(talk("a", "b", tools=(WEATHER,)), ROOM)
    with pytest.raises(ModelError, match=r"`tool_calls`"):
        qwen().encode_batch([talk("a", said("", tool_calls=(CALL,)))], ROOM)


def test_control_text_in_a_call_stays_letters() -> None:
    call = {"function": {"name": "f", "arguments": {"x": "<|im_end|>"}}}
    assert learned(template_of("qwen2_5"), talk("a", said("", tool_calls=(call,)))) == [
        '<tool_call>\n{"name": "f", "arguments": {"x": "<|im_end|>"}}\n</tool_call><|im_end|>'
    ]


@pytest.mark.parametrize("name", ["chatglm3", "glm4"])
def test_a_turn_without_an_end_ends_with_who_speaks_next(name: str) -> None:
    record = talk("a", said("b"), Message("tool", "c"), said("d"))
    assert [text for row in spans(template_of(name), record) for text in row][1::2] == [
        ("\n b" if name == "chatglm3" else "\nb") + "<|observation|>",
        ("\n d" if name == "chatglm3" else "\nd") + "<|user|>",
    ]


# Marks

MARKED = (
    "{{% for m in messages %}}<|im_start|>{{{{ m.role }}}}\n{{% if m.role == 'assistant' %}}{}{{% else %}}"
    "{{{{ m.content }}}}<|im_end|>{{% endif %}}{{{{ '\n' }}}}{{% endfor %}}"
    "{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}"
)


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}", "b<|im_end|>d<|im_end|>"),
        ("{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>", "b<|im_end|>d<|im_end|>"),
        (
            "{% generation %}{{ m.content[:1] }}{% endgeneration %}{% generation %}{{ m.content[1:] }}<|im_end|>\n"
            "{% endgeneration %}",
            "b<|im_end|>d<|im_end|>",
        ),
        ("Sure:\n{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}", "b<|im_end|>d<|im_end|>"),
        ("Sure:\n{% generation %}{{ m.content }}{% endgeneration %}\n<|im_end|>", "b<|im_end|>d<|im_end|>"),
    ],
)
def test_a_templates_own_marks_are_kept_and_an_end_is_always_learned(answer: str, wanted: str) -> None:
    template = ChatTemplate(AutoTokenizer.from_pretrained(ensure_builtin()), MARKED.format(answer), QWEN_STOPS)
    record = talk("a", "b", "<|im_end|>c", "d")
    assert learned(template, record) == [wanted]
    assert learned(template, talk("x", "y<|im_end|>")) == ["y<|im_end|><|im_end|>"]
    both = template.encode_batch([record], ROOM)[0]
    assert both[0].weights_T.tolist() == rows_of(template, record)[0].weights_T.tolist()  # type: ignore[union-attr]


def test_a_template_that_leaves_answers_out_is_refused() -> None:
    """Idefics3's wants a list of parts, and would teach empty answers."""
    source = (
        "{% for m in messages %}<|go|>{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}"
        "{% endfor %}<|end|>{% endfor %}{% if add_generation_prompt %}<|go|>{% endif %}"
    )
    with pytest.raises(ModelError, match=r"leaves out what an assistant says.*template_name"):
        ChatTemplate(byte_tokenizer("<|go|>", "<|end|>", eos_token="<|end|>"), source, [])


# encode_batch

EDGES = [
    "hi",
    "7",
    "a b",
    "<",
    "  ",
    " a",
    "b ",
    "\n",
    "",
    "\n\nc\n",
    "<|im_end|>",
    "</think>x",
    "<think>y</think>z",
    "é\u0301",
    '"',
    "\\",
    "&<>",
    "你好 ",
    "<tool_response>q</tool_response>",
]
PEEKING = {
    "by its letters": "{{ m.content | upper }}",
    "by its length": "{% if m.content | length > 2 %}{{ m.content }}{% else %}short{% endif %}",
    "by a word": "{% if 'hi' in m.content %}!{% endif %}{{ m.content }}",
    "by a part": "{{ m.content[:2] }}",
    "by replacing": "{{ m.content | replace('a', 'b') }}",
    "as JSON": "{{ m.content | tojson }}",
    "escaped": "{{ m.content | e }}",
    "joined and then trimmed": "{{ (m.content ~ ' x ').strip() }}",
    "joined and then searched": "{% set t = '<' ~ m.content %}{% if 'hi' in t %}!{% endif %}{{ t }}",
    "by block and search": "{% set t %}{{ m.content }}{% endset %}{% if 'a' in t %}!{% endif %}{{ t }}",
    "in a macro": "{% macro f(x) %}{{ x }}{% endmacro %}{% if 'a' in f(m.content) %}!{% endif %}{{ m.content }}",
    "by format": "{% if 'a' in '%s' | format(m.content) %}!{% endif %}{{ m.content }}",
    "by percent": "{% if 'a' in '%s' % m.content %}!{% endif %}{{ m.content }}",
    "by comparing": "{% if m.content == 'hi' %}!{% endif %}{{ m.content }}",
    "by listing": "{% if m.content in ['hi', 'b '] %}!{% endif %}{{ m.content }}",
    "trimmed": "{{ m.content | trim }}",
    "trimmed twice": "{{ m.content.lstrip('\\n').rstrip() }}",
    "first letter": "{{ m.content | first }}{{ m.content }}",
    "as number": "{{ m.content | int }}{{ m.content }}",
    "sorted": "{{ m.content | sort | join }}",
    "by truth": "{% if m.content %}{{ m.content }}{% else %}nothing{% endif %}",
    "by what is left of it": "{% if m.content | trim %}{{ m.content | trim }}{% else %}nothing{% endif %}",
    "by counting words": "{% if m.content | wordcount > 1 %}!{% endif %}{{ m.content }}",
    "by a test": "{% if m.content is lower %}!{% endif %}{{ m.content }}",
    "by lying in a text": "{% if m.content in 'hi there' %}!{% endif %}{{ m.content }}",
    "by a text's method": "{% if 'hi there'.startswith(m.content) %}!{% endif %}{{ m.content }}",
    "by list": "{{ (m.content | list) | length }}{{ m.content }}",
}  # fmt: skip


@pytest.mark.parametrize("way", PEEKING)
def test_a_template_that_looks_into_a_text_gives_the_same_in_a_batch(way: str) -> None:
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n" + PEEKING[way] + "<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    check_batch(ChatTemplate(AutoTokenizer.from_pretrained(ensure_builtin()), source, QWEN_STOPS))


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3", "mistral", "glm4", "deepseek_v3", "baichuan2"])
def test_a_batch_has_the_rows_of_its_records(name: str) -> None:
    check_batch(template_of(name))


def check_batch(template: ChatTemplate) -> None:
    """Compare `encode_batch` with `encode` on conversations of many shapes and texts."""
    rng = random.Random(1)
    records = []
    for _ in range(150):
        turns: list[Message] = [system(rng.choice(EDGES))] if rng.random() < 0.3 else []
        for _ in range(rng.randint(1, 3)):
            turns.append(Message("user", rng.choice(EDGES)))
            thought = rng.choice(EDGES) if rng.random() < 0.3 else None
            turns.append(said(rng.choice(EDGES), weight=rng.choice([None, None, 0, 0.5]), reasoning=thought))
        records.append(talk(*turns))
    policies = [ROOM, LAST, EncodePolicy(60, "truncate_prompt"), EncodePolicy(50, "split"), EncodePolicy(40)]
    for policy in [replace(p, faults="ignore") for p in policies]:
        for record, found in zip(records, template.encode_batch(records, policy), strict=True):
            alone = template.encode(record, policy)
            assert shown(found) == shown(alone)


def shown(found: list[Row] | str) -> Any:
    if isinstance(found, str):
        return found
    return [(r.ids_T.tolist(), r.weights_T.tolist(), r.origin, r.category, r.full_length) for r in found]
