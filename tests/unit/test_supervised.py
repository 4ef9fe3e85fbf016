"""`sftx.data.encode.supervised`: each supervised text is taught exactly once, and each turn ends where generation stops."""

from __future__ import annotations

import json
import random
import string
from typing import Any

import pytest
from tests.unit.test_template import QWEN_STOPS, byte_tokenizer, qwen
from tests.unit.test_template_families import FAMILIES, template_of
from tests.unit.test_template_turns import CALL, WEATHER, learned, said, system, talk

from sftx.data.corpus import Corpus
from sftx.data.encode.policy import EncodePolicy
from sftx.data.encode.template import ChatTemplate
from sftx.data.records.record import Message, Record
from sftx.errors import ModelError

ROOM = EncodePolicy(10_000)
SKIP = EncodePolicy(10_000, faults="skip")
TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n<ANSWER><|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL_TURN = Message("tool", "18", name="weather")


def template_with(answer: str, *special: str, stops: list[str] | None = None, source: str = TURNS) -> ChatTemplate:
    """Return a template that writes a turn by `answer`, a Jinja expression over the message `m`."""
    tokenizer = byte_tokenizer("<|im_start|>", *QWEN_STOPS, *special, eos_token="<|im_end|>")
    return ChatTemplate(tokenizer, source.replace("<ANSWER>", answer), stops or QWEN_STOPS)


def refused(template: ChatTemplate, record: Record) -> str:
    """Return why a record is refused; both ways of encoding must."""
    with pytest.raises(ModelError) as alone:
        template.encode(record, ROOM)
    with pytest.raises(ModelError) as together:
        template.encode_batch([talk("a", "fine"), record], ROOM)
    assert str(alone.value) == str(together.value)
    return str(alone.value)


MANGLES = {
    "drops reasoning": (
        "{{ m.content }}{% if false %}{{ m.reasoning_content }}{% endif %}",
        talk("a", said("b", reasoning="because")),
        "turn 2: its reasoning ('because') is missing",
    ),
    "repeats reasoning": (
        "{{ m.reasoning_content }}{{ m.reasoning_content }}{{ m.content }}",
        talk("a", said("b", reasoning="because")),
        "turn 2: its reasoning ('because') occurs 2 times",
    ),
    "drops the text beside a call": (
        "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% else %}{{ m.content }}{% endif %}{{ tools and '' }}",
        talk("a", said("Let me look", tool_calls=(CALL,)), TOOL_TURN, "18", tools=(WEATHER,)),
        "turn 2: its text ('Let me look') is missing",
    ),
    "drops an argument": (
        "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}{{ tools and '' }}",
        talk("a", said("", tool_calls=(CALL,)), TOOL_TURN, "18", tools=(WEATHER,)),
        "turn 2: an argument of its call ('北京') is missing",
    ),
    "drops the second call": (
        "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% endif %}{{ tools and '' }}",
        talk(
            "a",
            said("", tool_calls=(CALL, {"function": {"name": "clock", "arguments": "{}"}})),
            TOOL_TURN,
            "18",
            tools=(WEATHER,),
        ),
        "turn 2: the name of its call ('clock') is missing",
    ),
    "changes the text": (
        "{{ m.content | replace('\\n', ' ') }}",
        talk("a", "two\nlines"),
        "turn 2: its text ('two\\nlines') is missing",
    ),
    "cuts the text": ("{{ m.content.split('STOP')[0] }}", talk("a", "go STOP halt"), "its text ('go STOP halt')"),
    "thinks twice": (
        "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}",
        talk("a", "<think>\nwhy\n</think>\n\nb"),
        "its block of thinking ('</think>') occurs 2 times",
    ),
}


@pytest.mark.parametrize("how", MANGLES)
def test_a_row_that_a_template_does_not_teach_once_is_refused(how: str) -> None:
    answer, record, wanted = MANGLES[how]
    text = refused(template_with(answer), record)
    assert text.startswith("corpus.jsonl:3: turn 2: ")
    assert wanted in text
    assert "data.on_bad_rows=skip" in text


@pytest.mark.parametrize("how", MANGLES)
def test_such_rows_are_skipped_when_asked(how: str) -> None:
    answer, record, wanted = MANGLES[how]
    found = template_with(answer).encode_batch([talk("a", "fine"), record], SKIP)
    assert isinstance(found[0], list)
    assert isinstance(found[1], str)
    assert wanted in found[1]
    assert "corpus.jsonl" not in found[1]  # the code that lists the reason names the row


def test_bad_rows_are_those_of_the_template_too() -> None:
    assert Corpus(on_bad_rows="skip").encode_policy(9).faults == "skip"
    assert Corpus().encode_policy(9).faults == "error"


@pytest.mark.parametrize(
    "text",
    ["a", "assistant", "user\n", "think", "</think>", "x </think> y", "<tool_call>", "im_end", "  a  ", "aa\naaa"],
)
@pytest.mark.parametrize("name", ["chatml", "qwen2_5", "llama3", "mistral", "glm4", "phi3"])
def test_a_short_text_that_the_template_writes_too_is_no_fault(name: str, text: str) -> None:
    template = template_of(name)
    for record in (talk("a", text), talk("a", said(text, reasoning=text)), talk(text, text, text, text)):
        assert isinstance(template.encode(record, ROOM), list)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_family_refuses_ordinary_text(name: str) -> None:
    rng = random.Random(7)
    template = template_of(name)
    letters = string.ascii_letters + " \n\t\"'\\<>|{}你好é" + "\U0001f600"
    for _ in range(100):
        texts = ["x" + "".join(rng.choices(letters, k=rng.randint(0, 30))) + "y" for _ in range(4)]
        assert isinstance(template.encode(talk(*texts), ROOM), list)
        assert isinstance(template.encode(talk(texts[0], said(texts[1], reasoning=texts[2])), ROOM), list)


def test_arguments_may_be_spelled_as_json_in_any_order() -> None:
    arguments = {"b": 'two "words"\n', "a": ["x/y", {"c": "é"}], "n": 3}
    call = {"type": "function", "function": {"name": "f", "arguments": json.dumps(arguments)}}
    record = talk("a", said("", tool_calls=(call,)), TOOL_TURN, "ok", tools=(WEATHER,))
    written = "{{ m.content }}{% for c in m.tool_calls or [] %}<CALL>{% endfor %}{{ tools and '' }}"
    for spelled in (
        "{{ c.function | tojson }}",
        "{{ c.function.name }}{{ c.function.arguments | tojson | tojson }}",
        "{{ c.function.name }}{% for k, v in c.function.arguments | dictsort %}{{ k }}={{ v | tojson }}{% endfor %}",
    ):
        assert learned(template_with(written.replace("<CALL>", spelled)), record)


def test_a_name_that_occurs_elsewhere_is_no_fault() -> None:
    call: dict[str, Any] = {"type": "function", "function": {"name": "name", "arguments": '{"name": "name"}'}}
    record = talk("a", said("name", tool_calls=(call, call)), TOOL_TURN, "ok", tools=(WEATHER,))
    assert learned(template_of("qwen2_5"), record)


def test_thinking_that_the_prompt_closed_is_not_closed_again() -> None:
    source = TURNS.replace("assistant\n{% endif %}", "assistant\n<think></think>{% endif %}")
    answer = "{% if m.role == 'assistant' %}<think></think>{% if messages | length > 2 %}</think>{% endif %}{% endif %}"
    template = template_with(answer + "{{ m.content }}", source=source)
    assert learned(template, talk("a", "b")) == ["b<|im_end|>"]
    assert "its block of thinking ('</think>') occurs 2 times" in refused(
        template, talk(system("s"), Message("user", "a"), said("b"))
    )


def test_a_name_may_be_written_twice_around_a_call() -> None:
    written = (
        "{{ m.content }}{% for c in m.tool_calls or [] %}<{{ c.function.name }}>{{ c.function | tojson }}{% endfor %}"
    )
    record = talk("a", said("", tool_calls=(CALL,)), TOOL_TURN, "ok", tools=(WEATHER,))
    assert learned(template_with(written + "{{ tools and '' }}"), record)


def test_a_turn_that_ends_where_generation_does_not_stop_is_refused() -> None:
    """gpt-oss ends a call with a token of its own; only the model's EOS ids say that it is one."""
    answer = (
        "{% if m.tool_calls %}<|im_start|>to={{ m.tool_calls[0].function.name }}"
        "{{ m.tool_calls[0].function.arguments | tojson }}<|call|>{% else %}{{ m.content }}<|im_end|>{% endif %}"
        "{{ tools and '' }}"
    )
    source = TURNS.replace("<ANSWER><|im_end|>\n", answer)
    record = talk("a", said("", tool_calls=(CALL,)), TOOL_TURN, "ok", tools=(WEATHER,))
    text = refused(template_with("", "<|call|>", source=source), record)
    assert "turn 2: what is supervised ends in '<|call|>', at which generation does not stop" in text
    assert "generation_config.json" in text
    taught = learned(template_with("", "<|call|>", source=source, stops=[*QWEN_STOPS, "<|call|>"]), record)
    assert taught == ['<|im_start|>to=weather{"city": "北京"}<|call|>ok<|im_end|>']


def test_rows_that_are_cut_are_checked_before() -> None:
    """What max_seq_length cuts off is no fault of the template."""
    policy = EncodePolicy(16)
    found = qwen().encode(talk("hi", "a very long answer that does not fit in at all, by no means"), policy)
    assert isinstance(found, list)
    assert found[0].truncated


def test_an_empty_system_turn_and_blank_answers_are_no_fault() -> None:
    assert isinstance(qwen().encode(talk(system(""), Message("user", "a"), said(" \n")), ROOM), list)
