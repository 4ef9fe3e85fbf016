"""Ids and masks against two outside references, family by family: `renderers` and TRL's `*_training.jinja`.

Both are PyPI packages, which are put into a folder of their own: `make test-templates`, or

    pip install --no-deps --target FOLDER renderers==0.1.12 trl==1.16.0 openai openai-harmony tiktoken \
        prime-pydantic-config
    SFTX_TEMPLATE_REFERENCES=FOLDER python -m pytest -m peers tests/peers/test_templates.py

`renderers` writes each family's tokens by Python code, without a template. TRL's training templates are the publishers'
with `{% generation %}` marks. The publishers' own templates, which sftx renders here, are in TRL's package too. Each
supervised turn is compared with what the reference makes of the conversation up to it: the ids up to its end, and
which of them are supervised. gpt-oss is compared with TRL only: `renderers` downloads its vocabulary. The tokenizers are
byte-level ones with the special tokens of each family.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from tests.unit.test_template import byte_tokenizer

from sftx.data.encode.policy import EncodePolicy
from sftx.data.encode.render import INLINE, Renderer
from sftx.data.encode.template import ChatTemplate, template_source
from sftx.data.records.record import Message, Record
from sftx.errors import ModelError

pytestmark = pytest.mark.peers
DATE = "2024-07-26"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "its name"}},
            "required": ["city"],
        },
    },
}


def call(city: str) -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": city}}}


def talk(*turns: tuple[Any, ...], tools: bool = False) -> Record:
    """Return a conversation of (role, content[, other fields of the message])."""
    made = tuple(Message(role, content, **(more[0] if more else {})) for role, content, *more in turns)
    return Record(made, "c", "f", 1, {}, tools=(WEATHER,) if tools else ())


U, A, S = "user", "assistant", "system"
HI, YO = (U, "How are you?"), (A, "Fine, thanks.")
CALLS = (A, "", {"tool_calls": (call("Bern"),)})
RESULT = ("tool", '{"degrees": 18}', {"name": "weather"})
WHY = {"reasoning": "They ask politely.\nI answer."}
THINK = "<think>\nThey ask politely.\nI answer.\n</think>\n\n"
CONVERSATIONS = {
    "one turn": talk(HI, YO),
    "system": talk((S, "Be brief."), HI, YO),
    "empty system": talk((S, ""), HI, YO),
    "three turns": talk((S, "Be brief."), HI, YO, (U, "And now?"), (A, "Still fine."), (U, "Bye"), (A, "Bye!")),
    "trailing newlines": talk((U, "How are you?\n\n"), (A, "Fine.\n"), (U, "\nBye\n"), (A, "Bye!\n\n")),
    "leading spaces": talk((U, "  How are you?"), (A, "  def f():\n    return 1")),
    "other scripts": talk((U, "你好 👋"), (A, "你好！é ñ \u2028 end")),
    "braces and quotes": talk((U, '{{ x }} "a" \\n <b>'), (A, '{"a": "b\\"c"} {% if %} </b>')),
    "control tokens in cells": talk((U, "What is <CONTROL>?"), (A, "It is <CONTROL>, a token.")),
    "reasoning": talk(HI, (*YO, WHY)),
    "inline reasoning": talk(HI, (A, THINK + "Fine, thanks.")),
    "reasoning in both turns": talk(HI, (*YO, WHY), (U, "And now?"), (A, "Still fine.", {"reasoning": "Same again."})),
    "reasoning in the first turn": talk(HI, (*YO, WHY), (U, "And now?"), (A, "Still fine.")),
    "tools, no call": talk(HI, YO, tools=True),
    "call": talk((U, "Weather?"), CALLS, RESULT, (A, "It is 18."), tools=True),
    "call, system, more turns": talk((S, "S"), (U, "Weather?"), CALLS, RESULT, (A, "18."), HI, YO, tools=True),
    "text beside a call": talk((U, "Weather?"), (A, "Let me look.", CALLS[2]), RESULT, (A, "It is 18."), tools=True),
    "reasoning beside a call": talk(
        (U, "Weather?"), (A, "", CALLS[2] | WHY), RESULT, (A, "It is 18.", {"reasoning": "So."}), tools=True
    ),
    "two calls in turn": talk(
        (U, "Weather?"), CALLS, RESULT, (A, "", {"tool_calls": (call("Rom"),)}), RESULT, (A, "18."), tools=True
    ),
}


# What is known to differ, and why

CELLS = {"control tokens in cells"}
"""`renderers` takes a control token's letters in a cell for the token; sftx keeps them text, as transformers does when
told to sanitize, which is what it is compared with beside TRL's templates."""
NO_TOOLS = {
    "tools, no call", "call", "call, system, more turns", "text beside a call", "reasoning beside a call",
    "two calls in turn",
}  # fmt: skip
"""The template has no place for tools: refused."""
NO_SYSTEM = {"system", "empty system", "three turns"}
"""The publisher's template raises."""
EMPTY_BLOCKS = {"three turns", "trailing newlines", "call, system, more turns"}
"""The references keep the empty thinking of earlier turns; the publisher's template leaves it out at inference."""
EMPTY_BLOCKS_OF_A_CYCLE = EMPTY_BLOCKS | {"call", "text beside a call", "two calls in turn"}
"""... also between the calls for one question."""
EARLIER = {"reasoning in both turns", "reasoning in the first turn"}
"""TRL's training template keeps the thinking of earlier turns; at inference the publisher's leaves it out."""
INLINE_APART = {"inline reasoning"}
"""The references write inline thinking as it stands; sftx as the reasoning that it is, in the template's own form."""
DROPPED = {"text beside a call", "reasoning beside a call"}
"""The publisher's template drops what stands beside a call: refused. gpt-oss's drops it once a final answer follows:
sftx shows it in the prompt of that answer, as inference does."""
MOVED = {"text beside a call"}
"""Gemma 4's template writes the text after the tool's result: refused."""


# Families

IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
ARGS = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "/nothink")
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
LLAMA = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>",
    "<|python_tag|>", "<|finetune_right_pad_id|>",
)  # fmt: skip
GLM = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>")
HARMONY = (
    "<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>", "<|start|>", "<|end|>",
    "<|message|>", "<|call|>",
)  # fmt: skip
GEMMA = (
    "<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>",
    "<|tool_response>", "<tool_response|>", "<|channel>", "<channel|>", "<|think|>", '<|"|>', "<|image>", "<image|>",
    "<|image|>", "<|audio|>", "<|video|>",
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A family: its tokens, its template (TRL's copy of the publisher's, or sftx's own), and what it is compared with."""

    special: tuple[str, ...]
    eos: tuple[str, ...]
    """At which generation stops, as the model's generation_config.json lists them."""
    template: str = ""
    own: str = ""
    renderer: str = ""
    """Its configuration's class in `renderers`."""
    trains: str = ""
    """TRL's training template."""
    plain: tuple[str, ...] = ()
    """Added tokens that are not special."""
    named: dict[str, str] = field(default_factory=dict)
    inline: bool = False
    """The template has no place for reasoning: it stands before the answer."""
    next_ends: bool = False
    """The next speaker's token ends a turn."""
    differs: dict[str, set[str]] = field(default_factory=dict)
    """Of each reference the conversations for which it has other tokens, or that sftx refuses."""


QWEN = {"eos": IM[1:], "named": {"eos_token": "<|im_end|>"}}
FAMILIES = {
    "qwen3": Family(IM, template="qwen3", renderer="Qwen3RendererConfig", trains="qwen3_training", plain=TAGS, **QWEN, differs={"renderer": CELLS | EMPTY_BLOCKS_OF_A_CYCLE, "trains": EARLIER | EMPTY_BLOCKS_OF_A_CYCLE}),
    "qwen3, ours": Family(IM, own="qwen3", renderer="Qwen3RendererConfig", trains="qwen3_training", plain=TAGS, **QWEN, differs={"renderer": CELLS | EMPTY_BLOCKS_OF_A_CYCLE, "trains": EARLIER | EMPTY_BLOCKS_OF_A_CYCLE}),
    "qwen3.5": Family(
        IM, template="qwen3_5_think", renderer="Qwen35RendererConfig", trains="qwen3_5_think_training",
        plain=TAGS + VISION, **QWEN, differs={"renderer": CELLS | EMPTY_BLOCKS, "trains": EARLIER | EMPTY_BLOCKS}),
    "qwen3.6": Family(
        IM, template="qwen3_6", renderer="Qwen36RendererConfig", trains="qwen3_6_training", plain=TAGS + VISION, **QWEN, differs={"renderer": CELLS | EMPTY_BLOCKS, "trains": EARLIER | EMPTY_BLOCKS}),
    "qwen3.8": Family(
        IM, template="qwen3_8", renderer="Qwen38RendererConfig", trains="qwen3_8_training", plain=TAGS + VISION, **QWEN, differs={"renderer": CELLS | INLINE_APART, "trains": INLINE_APART}),
    "qwen2.5": Family(IM, template="qwen2_5", trains="qwen2_5_training", plain=TAGS, inline=True, **QWEN),
    "qwen2.5, ours": Family(IM, own="qwen2_5", trains="qwen2_5_training", plain=TAGS, inline=True, **QWEN),
    "llama3": Family(
        LLAMA, ("<|end_of_text|>", "<|eot_id|>"), template="llama3", trains="llama3_training", inline=True,
        named={"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}, differs={"trains": NO_TOOLS}),
    "llama3, ours": Family(
        LLAMA, ("<|end_of_text|>", "<|eot_id|>"), own="llama3", trains="llama3_training", inline=True,
        named={"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}, differs={"trains": NO_TOOLS}),
    "llama3.1": Family(
        LLAMA, ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"), template="llama3_1", renderer="Llama3RendererConfig", inline=True,
        named={"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}, differs={"renderer": CELLS | DROPPED}),
    "llama3.1, ours": Family(
        LLAMA, ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"), own="llama3_1", renderer="Llama3RendererConfig", inline=True,
        named={"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}, differs={"renderer": CELLS | DROPPED}),
    "glm4.5": Family(
        GLM, ("<|endoftext|>", "<|user|>", "<|observation|>"), template="glm4moe", renderer="GLM45RendererConfig",
        trains="glm4moe_training", plain=TAGS + ARGS, next_ends=True, named={"eos_token": "<|endoftext|>"}, differs={"renderer": CELLS}),
    "glm4.5, ours": Family(
        GLM, ("<|endoftext|>", "<|user|>", "<|observation|>"), own="glm4_5", renderer="GLM45RendererConfig",
        trains="glm4moe_training", plain=TAGS + ARGS, next_ends=True, named={"eos_token": "<|endoftext|>"}, differs={"renderer": CELLS}),
    "gpt-oss": Family(
        HARMONY, ("<|return|>", "<|endoftext|>", "<|call|>"), template="gptoss",
        trains="gptoss_training", named={"bos_token": "<|startoftext|>", "eos_token": "<|return|>"}, differs={"trains": INLINE_APART | DROPPED}),
    "gemma4": Family(
        GEMMA, ("<eos>", "<turn|>", "<|tool_response>"), template="gemma4_v5", renderer="Gemma4RendererConfig",
        named={"bos_token": "<bos>", "eos_token": "<eos>"}, differs={"renderer": CELLS | INLINE_APART | MOVED}),
    "nemotron3 nano": Family(
        (*IM, *TAGS), ("<|im_end|>",), template="nemotron_3_nano", renderer="Nemotron3RendererConfig",
        trains="nemotron_3_nano_training", named={"eos_token": "<|im_end|>"}, differs={"renderer": CELLS | INLINE_APART, "trains": INLINE_APART}),
    "nemotron3 ultra": Family(
        (*IM, *TAGS), ("<|im_end|>",), template="nemotron_3_ultra", renderer="Nemotron3UltraRendererConfig",
        trains="nemotron_3_ultra_training", named={"eos_token": "<|im_end|>"}, differs={"renderer": CELLS | INLINE_APART, "trains": INLINE_APART}),
    "nemotron3.5": Family(
        (*IM, *TAGS), ("<|im_end|>",), template="nemotron_3_5_lightning", renderer="Nemotron35RendererConfig",
        trains="nemotron_3_5_lightning_training", named={"eos_token": "<|im_end|>"}, differs={"renderer": CELLS | INLINE_APART, "trains": INLINE_APART}),
    "phi3": Family(
        ("<s>", *GLM[3:5], "<|system|>", "<|end|>", "<|endoftext|>"), ("<|endoftext|>", "<|end|>"), template="phi3",
        trains="phi3_training", inline=True, named={"bos_token": "<s>", "eos_token": "<|endoftext|>"}, differs={"trains": NO_TOOLS}),
    "phi3.5, ours": Family(
        ("<s>", *GLM[3:5], "<|system|>", "<|end|>", "<|endoftext|>"), ("<|endoftext|>", "<|end|>"), own="phi3_5",
        trains="phi3_5_training", inline=True, named={"bos_token": "<s>", "eos_token": "<|endoftext|>"}, differs={"trains": NO_TOOLS}),
    "gemma": Family(
        ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"), ("<eos>", "<end_of_turn>"), template="gemma",
        trains="gemma_training", inline=True, named={"bos_token": "<bos>", "eos_token": "<eos>"}, differs={"trains": NO_TOOLS | NO_SYSTEM}),
    "gemma3": Family(
        ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"), ("<eos>", "<end_of_turn>"), template="gemma3",
        trains="gemma3_training", inline=True, named={"bos_token": "<bos>", "eos_token": "<eos>"}, differs={"trains": NO_TOOLS}),
    "lfm2": Family(
        ("<|startoftext|>", *IM[:2], "<|pad|>", "<|tool_list_start|>", "<|tool_list_end|>", "<|tool_call_start|>",
         "<|tool_call_end|>", "<|tool_response_start|>", "<|tool_response_end|>"),
        ("<|im_end|>",), template="lfm2_v2", trains="lfm2_v2_training", inline=True,
        named={"bos_token": "<|startoftext|>", "eos_token": "<|im_end|>"},
    ),
    "cohere2": Family(
        ("<BOS_TOKEN>", "<EOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>",
         "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"),
        ("<|END_OF_TURN_TOKEN|>",), template="cohere2", trains="cohere2_training", inline=True,
        named={"bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>"}, differs={"trains": NO_TOOLS}),
}  # fmt: skip


# Comparing


@dataclass(frozen=True)
class Taught:
    """A supervised turn as a reference or sftx has it: its ids, where inference's prompt ends, what is supervised."""

    ids: list[int]
    prompt: list[int]
    supervised: list[int]
    """Positions."""


@pytest.fixture(scope="session")
def references() -> Path:
    """Return the folder of the references, importable; skip where there is none."""
    folder = Path(os.environ.get("SFTX_TEMPLATE_REFERENCES") or ".cache/template-references").resolve()
    if not (folder / "trl" / "chat_templates").is_dir():
        pytest.skip(f"{folder}: holds no references. To install them: make test-templates, or this file's docstring")
    sys.path.append(str(folder))
    return folder


def trl(references: Path, name: str) -> str:
    return (references / "trl" / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def tokenizer_of(family: Family) -> Any:
    tokenizer = byte_tokenizer(*family.special, **family.named)
    tokenizer.add_tokens(list(family.plain))
    return tokenizer


def record_for(family: Family, conversation: str) -> Record:
    """Return a conversation; its cells name a control token of the family."""
    record = CONVERSATIONS[conversation]
    messages = tuple(replace(m, content=m.content.replace("<CONTROL>", family.special[0])) for m in record.messages)
    return replace(record, messages=messages)


def thinks(message: Message) -> bool:
    return bool(message.reasoning) or "</think>" in message.content


def by_sftx(template: ChatTemplate, record: Record) -> list[Taught]:
    """Return what sftx teaches of each supervised turn."""
    rows = template.encode(record, EncodePolicy(100_000))
    assert isinstance(rows, list), rows
    found = []
    for row in rows:
        ids, place = row.ids_T.tolist(), 0
        for supervised, run in itertools.groupby(row.supervised_T.tolist()):
            end = place + len(list(run))
            if supervised:
                found.append(Taught(ids[:end], ids[:place], list(range(place, end))))
            place = end
    return found


def plain(family: Family, messages: tuple[Message, ...]) -> list[dict[str, Any]]:
    """Return messages as the references take them."""
    out = []
    for m in messages:
        made: dict[str, Any] = {"role": m.role, "content": m.content}
        if m.reasoning and family.inline:
            made["content"] = INLINE.format(m.reasoning) + m.content
        elif m.reasoning:
            made["reasoning_content"] = m.reasoning
        made |= {"tool_calls": list(m.tool_calls)} if m.tool_calls else {}
        made |= {"name": m.name, "tool_call_id": "c1"} if m.role == "tool" else {}
        out.append(made)
    return out


def prefixes(record: Record) -> Iterator[tuple[Message, ...]]:
    """Yield the conversation up to each answer."""
    return (record.messages[:i] for i, m in enumerate(record.messages, 1) if m.role == "assistant")


def by_renderers(family: Family, tokenizer: Any, record: Record, references: Path) -> list[Taught]:
    base, configs = import_module("renderers.base"), import_module("renderers.configs")
    kind, tools, found = getattr(configs, family.renderer), list(record.tools) or None, []
    for messages in prefixes(record):
        options = {"enable_thinking": thinks(messages[-1])} if "enable_thinking" in kind.model_fields else {}
        renderer, given = base.create_renderer(tokenizer, kind(**options)), plain(family, messages)
        sample = base.build_training_sample(renderer, given, tools=tools, ensure_final_stop=True)
        prompt = renderer.render(given[:-1], tools=tools, add_generation_prompt=True).token_ids
        found.append(Taught(list(sample.token_ids), list(prompt), [i for i, on in enumerate(sample.loss_mask) if on]))
    return found


def by_trl(family: Family, tokenizer: Any, record: Record, references: Path) -> list[Taught]:
    """By the training template; where cells hold control tokens by the publisher's, which transformers sanitizes."""
    sanitized = any(family.special[0] in m.content for m in record.messages)
    name = (family.template or family.trains) if sanitized else family.trains
    marked, tools, found = Renderer(tokenizer, trl(references, name), DATE), list(record.tools) or None, []
    for messages in prefixes(record):
        options: dict[str, Any] = {"tools": tools, "chat_template": marked.source}
        options |= {"enable_thinking": thinks(messages[-1])} if marked.thinking_switch else {}
        given = plain(family, messages)
        options["sanitize_control_tokens"] = sanitized
        out = tokenizer.apply_chat_template(given, return_assistant_tokens_mask=not sanitized, **options)
        prompt = tokenizer.apply_chat_template(given[:-1], add_generation_prompt=True, **options)["input_ids"]
        ids, mask = list(out["input_ids"]), out.get("assistant_masks")
        found.append(Taught(ids, prompt, [i for i in range(len(ids)) if mask is None or mask[i]]))
    return found


REFERENCES: dict[str, Callable[..., list[Taught]]] = {"renderer": by_renderers, "trains": by_trl}


def difference(ours: Taught, theirs: Taught, tokenizer: Any, *, next_ends: bool) -> str | None:
    """Return what differs in a turn, or None.

    What is supervised is what the reference supervises after the prompt that inference renders; both may count white
    space around it in or out. `next_ends`: the next speaker's token ends the turn, which a reference leaves out.
    """

    def text(ids: list[int]) -> str:
        return tokenizer.decode(ids)

    ids = ours.ids[:-1] if next_ends else ours.ids
    if theirs.ids[: len(ids)] != ids:
        return f"other ids: {text(ids[len(ours.prompt) :])!r} and {text(theirs.ids[len(ours.prompt) :])!r}"
    if theirs.prompt != ours.prompt:
        return f"another prompt: {text(ours.prompt)[-60:]!r} and {text(theirs.prompt)[-60:]!r}"
    mine, other = set(ours.supervised) & set(range(len(ids))), {i for i in theirs.supervised if i >= len(ours.prompt)}
    if text([theirs.ids[i] for i in sorted(mine ^ other - set(range(len(ids), len(theirs.ids))))]).strip():
        return f"other tokens are supervised: {text([ours.ids[i] for i in sorted(mine - other)])!r} only by sftx"
    rest = text(theirs.ids[len(ids) :]).removesuffix(tokenizer.eos_token)  # Phi-3's ends a conversation with it
    return None if next_ends or not rest.strip() else f"the reference goes on with {rest!r}"


CASES = [(name, kind) for name, family in FAMILIES.items() for kind in REFERENCES if getattr(family, kind)]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_ids_and_masks_are_the_references(name: str, kind: str, conversation: str, references: Path) -> None:
    family = FAMILIES[name]
    tokenizer, record = tokenizer_of(family), record_for(family, conversation)
    source = template_source(family.own) if family.own else trl(references, family.template)
    template = ChatTemplate(tokenizer, source, list(family.eos), DATE)
    expected = conversation in family.differs.get(kind, set())
    try:
        ours = by_sftx(template, record)
    except ModelError:
        if not expected:
            raise
        return
    theirs = REFERENCES[kind](family, tokenizer, record, references)
    found = [difference(a, b, tokenizer, next_ends=family.next_ends) for a, b in zip(ours, theirs, strict=True)]
    assert all(turn.ids[-1] in template.stop_ids() for turn in ours)
    if expected:
        assert any(found), "it does not differ any more: take it out of `differs`"
    else:
        assert not any(found), "\n".join(filter(None, found))
