"""What the newer models' own templates do, each shown by a small template of ours that behaves the same way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.unit.test_supervised import refused
from tests.unit.test_template import byte_tokenizer
from tests.unit.test_template_families import spans, template_of
from tests.unit.test_template_turns import CALL, ROOM, WEATHER, learned, said, talk
from transformers import PreTrainedTokenizerFast

from sftx.config.composition.prepare import compose_checked
from sftx.data.encode.template import ChatTemplate, template_source
from sftx.data.records.record import Message, Record
from sftx.data.store.token_store import token_key
from sftx.errors import ConfigError, ModelError, RunFolderError
from sftx.model.loading.builtin import ensure_builtin
from sftx.model.loading.family import Family, family_named
from sftx.model.loading.load import Source, load_template
from sftx.run import run

RESULT = Message("tool", "18", name="weather")
THINK = "<think>\n{}\n</think>\n\n"


def tokenizer_of(*special: str, plain: tuple[str, ...] = (), eos: str) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with special tokens, and with added tokens that are not special."""
    tokenizer = byte_tokenizer(*special, eos_token=eos)
    tokenizer.add_tokens(list(plain))
    return tokenizer


def called(text: str = "", reasoning: str | None = None, answer: str = "It is 18.", last: str | None = None) -> Record:
    """Return a conversation with a call of a tool and an answer after its result."""
    first = said(text, tool_calls=(CALL,), reasoning=reasoning)
    return talk("hi", first, RESULT, said(answer, reasoning=last), tools=(WEATHER,))


# Harmony (gpt-oss): channels; a call ends with a token of its own; earlier analysis is left out once there is a final.

CHANNELS = """\
{%- set ns = namespace(call='') -%}
{%- for m in messages -%}
{%- if m.role == 'assistant' and m.tool_calls -%}
{%- set final = messages[loop.index:] | rejectattr('tool_calls', 'defined') | selectattr('role', 'eq', 'assistant') -%}
{%- set thought = m.thinking or m.content -%}
{%- if thought and not final | list -%}{{ '<|start|>assistant<|channel|>analysis<|message|>' + thought + '<|end|>' }}{%- endif -%}
{%- set ns.call = m.tool_calls[0].function.name -%}
{{ '<|start|>assistant to=' + ns.call + '<|channel|>commentary<|message|>' -}}
{{ (m.tool_calls[0].function.arguments | tojson) + '<|call|>' }}
{%- elif m.role == 'assistant' and loop.last -%}
{%- if m.thinking -%}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{%- endif -%}
{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}
{%- elif m.role == 'assistant' -%}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}
{%- elif m.role == 'tool' -%}{{ '<|start|>' + ns.call + ' to=assistant<|message|>' + (m.content | tojson) + '<|end|>' }}
{%- else -%}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}
{%- endif -%}
{%- endfor -%}
{%- if tools -%}{%- endif -%}
{%- if add_generation_prompt -%}{{ '<|start|>assistant' }}{%- endif -%}
"""
HARMONY = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>", "<|endoftext|>")


def model_folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, source: str, eos: object) -> Source:
    """Write the files of a model that a template is loaded from."""
    tokenizer.chat_template = source
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "other", "eos_token_id": 0}), encoding="utf-8")
    if eos is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}), encoding="utf-8")
    return Source("other", tmp_path, "other")


def channels(tmp_path: Path, *eos: str) -> ChatTemplate:
    tokenizer = tokenizer_of(*HARMONY, eos="<|return|>")
    ids = [tokenizer.convert_tokens_to_ids(t) for t in eos]
    source = model_folder(tmp_path, tokenizer, CHANNELS, ids or None)
    return load_template(source, Family([], None, []), None, lambda _: None)


def test_a_models_own_eos_ids_end_its_calls(tmp_path: Path) -> None:
    template = channels(tmp_path, "<|return|>", "<|endoftext|>", "<|call|>")
    assert set(template.stop_tokens) == {"<|return|>", "<|endoftext|>", "<|call|>"}
    assert spans(template, called()) == [
        [
            "<|start|>user<|message|>hi<|end|><|start|>assistant",
            ' to=weather<|channel|>commentary<|message|>{"city": "北京"}<|call|>',
            '<|start|>weather to=assistant<|message|>"18"<|end|><|start|>assistant',
            "<|channel|>final<|message|>It is 18.<|return|>",
        ]
    ]


def test_without_those_ids_a_call_is_refused_not_cut(tmp_path: Path) -> None:
    assert "ends in '<|call|>', at which generation does not stop" in refused(channels(tmp_path), called())


def test_eos_ids_may_be_one_and_stand_in_the_models_config(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(*HARMONY, eos="<|return|>")
    config = {"model_type": "other", "eos_token_id": tokenizer.convert_tokens_to_ids("<|call|>")}
    source = model_folder(tmp_path, tokenizer, CHANNELS, None)
    for eos, wanted in (
        (None, "<|call|>"),
        ([10**6, "x", None], "<|call|>"),
        (config["eos_token_id"] - 1, "<|return|>"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}), encoding="utf-8")
        template = load_template(source, Family([], None, []), None, lambda _: None)
        assert wanted in template.stop_tokens


@pytest.mark.parametrize("text", [{"text": "Let me look"}, {"reasoning": "Let me look"}])
def test_reasoning_beside_a_call_is_learned_though_later_turns_drop_it(tmp_path: Path, text: dict[str, str]) -> None:
    """The prompt of the answer shows it, as at inference; the whole conversation as the template renders it does not."""
    template = channels(tmp_path, "<|return|>", "<|call|>")
    assert spans(template, called(**text, last="so")) == [  # type: ignore[arg-type]
        [
            "<|start|>user<|message|>hi<|end|><|start|>assistant",
            "<|channel|>analysis<|message|>Let me look<|end|><|start|>assistant to=weather<|channel|>commentary<|message|>"
            '{"city": "北京"}<|call|>',
            '<|start|>weather to=assistant<|message|>"18"<|end|><|start|>assistant',
            "<|channel|>analysis<|message|>so<|end|><|start|>assistant<|channel|>final<|message|>It is 18.<|return|>",
        ]
    ]


def test_thinking_inside_the_text_goes_to_its_channel(tmp_path: Path) -> None:
    template = channels(tmp_path, "<|return|>", "<|call|>")
    apart = learned(template, talk("hi", said("yo", reasoning="why")))
    assert apart == [
        "<|channel|>analysis<|message|>why<|end|><|start|>assistant<|channel|>final<|message|>yo<|return|>"
    ]
    assert learned(template, talk("hi", THINK.format("why") + "yo")) == apart
    assert learned(template, talk("hi", said(THINK.format("why") + "yo", reasoning="why"))) == apart
    assert "other thinking inside its text" in refused(
        template, talk("hi", said(THINK.format("why") + "yo", reasoning="x"))
    )
    assert learned(template, talk("hi", THINK.format("") + "yo")) == ["<|channel|>final<|message|>yo<|return|>"]


# Gemma 4: a call is ended by the token that opens its result; reasoning has a key of its own name.

TURNS = """\
{{- '<bos>' -}}
{%- for m in messages if m.role != 'tool' -%}
{%- if loop.previtem is not defined or not loop.previtem.tool_calls -%}
{{ '<|turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' -}}
{%- endif -%}
{%- if m.get('reasoning') -%}{{ '<|channel>thought\\n' + m.reasoning + '\\n<channel|>' -}}{%- endif -%}
{%- for c in m.tool_calls or [] -%}
{{ '<|tool_call>call:' + c.function.name + '{' -}}
{%- for k, v in c.function.arguments | dictsort -%}{{ k + ':<|"|>' + v + '<|"|>' -}}{%- endfor -%}{{ '}<tool_call|>' -}}
{%- endfor -%}
{{- m.content | trim -}}
{%- if m.tool_calls -%}
{{ '<|tool_response>' -}}
{%- for r in messages if r.role == 'tool' -%}{{ r.content + '<tool_response|>' -}}{%- endfor -%}
{%- else -%}{{ '<turn|>\\n' -}}{%- endif -%}
{%- endfor -%}
{%- if tools -%}{%- endif -%}
{%- if add_generation_prompt and messages[-1].role != 'tool' -%}{{ '<|turn>model\\n' }}{%- endif -%}
"""
GEMMA = (
    "<bos>", "<eos>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>",
    "<|tool_response>", "<tool_response|>", '<|"|>',
)  # fmt: skip


def test_a_call_may_end_with_what_opens_its_result() -> None:
    tokenizer = tokenizer_of(*GEMMA, eos="<eos>")
    template = ChatTemplate(tokenizer, TURNS, ["<eos>", "<turn|>", "<|tool_response>"])
    assert template.stop_tokens[0] == "<turn|>", "what ends a plain answer is the first, whatever the order of EOS ids"
    assert spans(template, called(reasoning="why")) == [
        [
            "<bos><|turn>user\nhi<turn|>\n<|turn>model\n",
            '<|channel>thought\nwhy\n<channel|><|tool_call>call:weather{city:<|"|>北京<|"|>}<tool_call|><|tool_response>',
            "18<tool_response|>",
            "It is 18.<turn|>",
        ]
    ]
    assert "generation does not stop" in refused(ChatTemplate(tokenizer, TURNS, ["<turn|>", "<eos>"]), called())


# Qwen3.8, Nemotron 3, DeepSeek-R1: the prompt opens the thinking.

OPENED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}ANSWER{% else %}{{ m.content }}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>EMPTY</think>{% else %}<think>\n{% endif %}"
    "{% endif %}"
)
QWEN3_8 = OPENED.replace("EMPTY</think>", "\n\n</think>\n\n").replace(
    "ANSWER", "<think>\n{{ (m.reasoning_content or '') | trim }}\n</think>\n\n{{ m.content }}"
)
"""It reads reasoning from its key only, and writes a block always."""
NEMOTRON = OPENED.replace("EMPTY", "").replace(
    "ANSWER",
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n{{ m.content }}"
    "{% elif '<think>' in m.content %}{{ m.content }}{% else %}<think></think>{{ m.content }}{% endif %}",
)
"""It writes thinking inside the text as it stands there."""
SPACES = ["<think>why</think>yo", "<think>\nwhy\n</think>\n\nyo", "\n<think>\n\nwhy</think>\n\n\nyo"]


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("inline", SPACES)
@pytest.mark.parametrize(("source", "wanted"), [(QWEN3_8, "why\n</think>\n\nyo"), (NEMOTRON, "why\n</think>\nyo")])
def test_thinking_inside_the_text_is_learned_once(source: str, wanted: str, inline: str, special: bool) -> None:
    tags = ("<think>", "</think>")
    names = ("<|im_start|>", "<|im_end|>")
    tokenizer = tokenizer_of(*names, *(tags if special else ()), plain=() if special else tags, eos="<|im_end|>")
    template = ChatTemplate(tokenizer, source, [])
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n"
    for answer in (inline, said("yo", reasoning="why")):
        assert spans(template, talk("hi", answer)) == [[prompt, wanted + "<|im_end|>"]]
        batch = template.encode_batch([talk("hi", answer)], ROOM)[0]
        close = batch[0].ids_T.tolist().count(tokenizer.convert_tokens_to_ids("</think>"))  # type: ignore[union-attr]
        assert close == 1, "a token, not letters"
    assert spans(template, talk("hi", "yo"))[0][1] == "yo<|im_end|>"


@pytest.mark.parametrize("inline", SPACES)
def test_thinking_is_learned_once_where_the_template_writes_the_text_as_it_is(inline: str) -> None:
    tokenizer = tokenizer_of("<|im_start|>", "<|im_end|>", plain=("<think>", "</think>"), eos="<|im_end|>")
    template = ChatTemplate(tokenizer, OPENED.replace("EMPTY", "").replace("ANSWER", "{{ m.content | trim }}"), [])
    taught = inline.strip().removeprefix("<think>").lstrip("\n") + "<|im_end|>"
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n"
    (row,) = spans(template, talk("hi", inline))
    assert row[0] == prompt
    assert row[1].lstrip("\n") == taught


@pytest.mark.parametrize("inline", SPACES)
@pytest.mark.parametrize("name", ["chatml", "qwen3"])
def test_tags_of_thinking_are_tokens_where_the_model_has_them(name: str, inline: str) -> None:
    """In a template that writes an answer's text as it is, or looks for them itself; elsewhere in a cell they are text."""
    tokenizer = tokenizer_of("<|im_start|>", "<|im_end|>", "<think>", "</think>", eos="<|im_end|>")
    template = ChatTemplate(tokenizer, template_source(name), [])
    (row,) = template.encode(talk("hi <think>", inline + " <think>"), ROOM)
    taught = row.ids_T[row.supervised_T].tolist()  # type: ignore[union-attr]
    tags = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    assert [taught.count(tag) for tag in tags] == [1, 1]
    assert tokenizer.decode(taught).endswith("yo <think><|im_end|>")
    assert not set(tags) & set(row.ids_T[~row.supervised_T].tolist())  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("block", "written"),
    [
        ("<think>\n\n</think>\n\n", ""),
        ("<think></think>", "<think>\n\n</think>\n\n"),
        ("<|channel>thought\n<channel|>", ""),
        ("<|START_THINKING|><|END_THINKING|>", ""),
        ("<think></think>", "</think>"),
    ],
)
def test_an_empty_thought_may_stand_in_the_prompt_only(block: str, written: str) -> None:
    """Gemma 4 31B, DeepSeek-V3.2, Command R7B: the template leaves it out of a finished conversation."""
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}WRITTEN{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\nBLOCK{% endif %}"
    )
    tokenizer = tokenizer_of("<|im_start|>", "<|im_end|>", eos="<|im_end|>")
    template = ChatTemplate(tokenizer, source.replace("BLOCK", block).replace("WRITTEN", written), [])
    begin, prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "<|im_start|>assistant\n" + block
    assert spans(template, talk("hi", "yo", "bye", "ok")) == [
        [begin + block, "yo<|im_end|>"],
        [f"{begin}{written}yo<|im_end|>\n<|im_start|>user\nbye<|im_end|>\n{prompt}", "ok<|im_end|>"],
    ]
    assert (
        template.encode_batch([talk("hi", "yo")], ROOM)[0][0].ids_T.tolist()
        == template.encode(  # type: ignore[union-attr]
            talk("hi", "yo"), ROOM
        )[0].ids_T.tolist()
    )
    with pytest.raises(ModelError, match="another text before the answer"):
        template.encode(talk("hi", said("yo", reasoning="why")), ROOM)


def test_the_option_for_thinking_may_have_another_name() -> None:
    """DeepSeek-V3.1's and Granite's is `thinking`."""
    source = (
        OPENED.replace("enable_thinking", "thinking")
        .replace("EMPTY", "")
        .replace("ANSWER", "<think>{{ m.reasoning_content and '\n' + m.reasoning_content }}</think>{{ m.content }}")
    )
    tokenizer = tokenizer_of("<|im_start|>", "<|im_end|>", "<think>", "</think>", eos="<|im_end|>")
    template = ChatTemplate(tokenizer, source, [])
    assert template.thinking_switch == "thinking"
    begin = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert spans(template, talk("hi", "yo")) == [[begin + "<think></think>", "yo<|im_end|>"]]
    assert spans(template, talk("hi", said("yo", reasoning="a"))) == [[begin + "<think>\n", "a</think>yo<|im_end|>"]]
    rows = template.encode(talk("hi", "yo"), ROOM)
    assert template.thinking_of(rows) is False  # type: ignore[arg-type]
    mentions = ChatTemplate(tokenizer, "{# thinking is fun #}" + DATED, [])
    assert mentions.thinking_switch is None


# Llama 3.1, GLM-4.5, Phi-3.5: sftx's own templates


@pytest.mark.parametrize("beside", [{"text": "Let me look"}, {"reasoning": "why"}])
def test_what_llama_3_1_drops_beside_a_call_is_refused(beside: dict[str, str]) -> None:
    assert "is missing from what the chat template makes" in refused(template_of("llama3_1"), called(**beside))  # type: ignore[arg-type]


def test_glm_4_5_ends_a_call_for_the_tool_and_an_answer_for_the_user() -> None:
    family = family_named("glm4_moe")
    assert family is not None
    assert family.template == "glm4_5"
    record = called(text="Let me look", reasoning="why", last="so")
    texts = [text for row in spans(template_of("glm4_5"), record) for text in row]
    call = "\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>北京</arg_value>\n</tool_call>"
    assert texts[1::2] == [
        f"\n<think>why</think>\nLet me look{call}<|observation|>",
        "\n<think>so</think>\nIt is 18.<|user|>",
    ]
    alone = talk("hi", said("", tool_calls=(CALL,)), tools=(WEATHER,))
    assert learned(template_of("glm4_5"), alone) == [call + "<|observation|>"]


def test_glm_4_5_leaves_out_earlier_thinking() -> None:
    record = talk("hi", said("yo", reasoning="why"), "bye", said("ok", reasoning="so"))
    rows = spans(template_of("glm4_5"), record)
    assert [row[-1] for row in rows] == ["\n<think>why</think>\nyo<|user|>", "\n<think>so</think>\nok<|user|>"]
    assert "<|assistant|>\n<think></think>\nyo<|user|>\nbye" in rows[1][0]


@pytest.mark.parametrize(("name", "begins"), [("phi3", "<|system|>\n<|end|>\n<|user|>"), ("phi3_5", "<|user|>")])
def test_phi_3_5_leaves_an_empty_system_turn_out(name: str, begins: str) -> None:
    record = talk(Message("system", ""), Message("user", "hi"), said("yo"))
    assert spans(template_of(name), record)[0][0].startswith(begins)


# Llama 3.2, gpt-oss: today's date

DATED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DATE = "Today: {{ strftime_now('%d %b %Y') if strftime_now is defined else 'never' }}\n"


def dated(date: str | None, source: str = DATE + DATED) -> ChatTemplate:
    return ChatTemplate(tokenizer_of("<|im_start|>", "<|im_end|>", eos="<|im_end|>"), source, [], date)


def test_a_template_writes_the_date_that_is_set() -> None:
    template = dated("2025-03-01")
    prompt = "Today: 01 Mar 2025\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert spans(template, talk("hi", "yo")) == [[prompt, "yo<|im_end|>"]]
    for row in template.encode_batch([talk("hi", "yo")] * 3, ROOM):
        assert template.tokenizer.decode(row[0].ids_T) == prompt + "yo<|im_end|>"  # type: ignore[union-attr]
    assert template.tokenizer.decode(template.prompt_ids([{"role": "user", "content": "hi"}])) == prompt
    marked = dated(
        "2025-03-01", DATE + DATED.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}")
    )
    assert spans(marked, talk("hi", "yo"))[0][0] == prompt


def test_a_date_that_cannot_be_set_is_refused() -> None:
    with pytest.raises(ModelError, match="today's date by a format that cannot be read"):
        dated("2025-03-01", "{% set f = '%Y' %}{{ strftime_now(f) }}" + DATED)


def test_the_date_is_in_the_key_of_the_tokens_where_it_is_written() -> None:
    def key(template: ChatTemplate) -> str:
        return token_key("corpus", 1, template, ROOM)

    assert len({key(dated(d)) for d in ("2025-03-01", "2025-03-02")}) == 2
    assert len({key(dated(d, DATED)) for d in ("2025-03-01", "2025-03-02")}) == 1
    assert (dated("2025-03-01").date, dated("2025-03-01", DATED).date) == ("2025-03-01", None)


@pytest.mark.parametrize("text", ["today", "2025-13-01", "01.03.2025", "20250301", "2025-03-01T00:00", "null"])
def test_only_a_date_is_a_date(text: str) -> None:
    with pytest.raises(ConfigError, match="template_date"):
        compose_checked([f"template_date={text}"])


def test_a_repeated_and_a_resumed_run_see_the_same_tokens(
    tmp_path: Path, make_config: Any, captured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On any day: the tokens are made anew, in an empty cache."""
    base = tmp_path / "base"
    shutil.copytree(ensure_builtin(), base)
    (base / "chat_template.jinja").write_text(DATE + DATED, encoding="utf-8")
    words = [f"model_name_or_path={base}", "max_steps=1", "save_steps=1"]
    first = make_config(*words)
    run([first])
    before = [row.ids_T.tolist() for row in captured.session.rows]
    assert "Today: 26 Jul 2024" in captured.session.template.tokenizer.decode(before[0])
    folder = Path(first.output_dir)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["effective"]["settings"]["template_date"] == "2024-07-26"
    assert "writes today's date: 2024-07-26" in (folder / "train.log").read_text(encoding="utf-8")
    monkeypatch.setenv("SFTX_CACHE", str(tmp_path / "cache"))
    run([make_config(*words[:1], "max_steps=2", f"output_dir={folder}")])
    assert [row.ids_T.tolist() for row in captured.session.rows] == before
    with pytest.raises(RunFolderError, match='template_date: "2024-07-26" -> "2025-03-01"'):
        run([make_config(*words[:1], "max_steps=3", f"output_dir={folder}", "template_date=2025-03-01")])
