"""Conversations to text: what the chat template renders, at inference and in training."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import cached_property
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from sftx.data.encode.special_tokens import THINKING, SpecialTokens
from sftx.data.records.record import Message, Record
from sftx.errors import ModelError

Marks = list[tuple[int, int]]
"""Where a template's `{% generation %}` blocks lie in what it rendered, in characters."""
INLINE = "<think>\n{}\n</think>\n\n"
"""How reasoning stands before an answer when the template has no place for it."""
SWITCHES = {"enable_thinking": "enable_thinking", "thinking": r"\bthinking is |(?:if|not) thinking\b"}
"""Options by which templates let a model think, with how they read them; the second is DeepSeek's and Granite's."""
NOW = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
"""How a template asks for today's date."""
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
REASONING = re.compile(rf"""[.'"](?:{"|".join(REASONING_KEYS)})\b""")
"""How a template reads an assistant's reasoning: a key of the message."""


class Renderer:
    """The chat template of one tokenizer."""

    def __init__(self, tokenizer: Any, source: str, date: str | None = None) -> None:
        self.tokenizer = tokenizer
        code = re.sub(r"\{#.*?#\}", "", source, flags=re.DOTALL)  # not what its comments say
        self.date = date if "strftime_now" in code else None
        """The day that the template writes as today; None when it writes none."""
        self.source = source if self.date is None else _dated(source, self.date)
        self.thinking_switch = next((name for name, reads in SWITCHES.items() if re.search(reads, code)), None)
        """The template's option for thinking; None when it has none."""
        self.has_marks = "endgeneration" in code
        self._takes_reasoning = REASONING.search(code) is not None
        self._has_place_for = {"tools": "tools" in code, "tool_calls": "tool_calls" in code}

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] = (),
        thinking: bool | None = None,
    ) -> tuple[str, Marks | None]:
        """Return the text that the template makes of messages, and where its marks lie in a finished conversation.

        Raises:
            ModelError: the template cannot render them.
        """
        switch = {} if thinking is None or not self.thinking_switch else {self.thinking_switch: thinking}
        marked = self.has_marks and not generation_prompt
        try:
            (text,), marks = render_jinja_template(
                [messages],
                tools=list(tools) or None,
                chat_template=self.source,
                return_assistant_tokens_mask=marked,
                add_generation_prompt=generation_prompt,
                **self.tokenizer.special_tokens_map,
                **switch,
            )
        except Exception as error:  # Jinja's errors, and whatever a template raises itself
            raise ModelError(
                f"the chat template cannot render a conversation ({error}). Choose another template_name."
            ) from error
        return text, marks[0] if marked else None

    def check_tools(self, record: Record) -> None:
        """Refuse tools that the template would leave out without a word.

        Raises:
            ModelError: it has no place for a tool's definition, or for a call.
        """
        uses = {"tools": bool(record.tools), "tool_calls": any(m.tool_calls for m in record.messages)}
        missing = [name for name, used in uses.items() if used and not self._has_place_for[name]]
        if missing:
            raise ModelError(
                f"the conversation has `{missing[0]}`, and the chat template has no place for them: they would not "
                f"be trained on. Choose a template_name that has, such as qwen2_5 or qwen3, or a model that brings one."
            )

    def canonical(self, record: Record) -> Record:
        """Return a record with the thinking inside its answers as reasoning, where the template wants it apart."""
        if not any(m.role == "assistant" and "</think>" in m.content for m in record.messages):
            return record
        return replace(record, messages=tuple(map(self._apart, record.messages)))

    def _apart(self, message: Message) -> Message:
        found = THINKING.match(message.content) if message.role == "assistant" else None
        if not found:
            return message
        thought, rest = found.group(2).strip("\n"), found.group(4).lstrip("\n")
        if message.reasoning:  # the same twice is once; other thinking stays, and is refused
            return message if message.reasoning.strip() != thought.strip() else replace(message, content=rest)
        return replace(message, content=rest, reasoning=thought or None) if self._splits_thinking else message

    @cached_property
    def _splits_thinking(self) -> bool:
        """True when the template makes another text of thinking inside an answer than of the same given apart."""
        if not self._takes_reasoning:
            return False
        question = {"role": "user", "content": "Question"}
        inline = {"role": "assistant", "content": INLINE.format("Thought") + "Answer"}
        apart = self.dict_of("assistant", "Answer", "Thought")
        try:
            texts = [self.render([question, a], generation_prompt=False, thinking=True) for a in (inline, apart)]
        except ModelError:
            return True
        return texts[0][0] != texts[1][0]

    def dicts(
        self, messages: Sequence[Message], special: SpecialTokens, *, json_arguments: bool = False
    ) -> list[dict[str, Any]]:
        """Return messages as templates read them, with the special tokens in their cells escaped.

        A call's arguments are an object, as inference servers hand them over, or JSON text for the templates
        that write them as they are.
        """
        out = []
        for message in messages:
            escape = special.escape_answer if message.role == "assistant" else special.escape
            content, reasoning = escape(message.content), special.escape(message.reasoning or "")
            out.append(self.dict_of(message.role, content, reasoning))
            if message.name is not None:
                out[-1]["name"] = message.name
            if message.tool_calls:
                calls = [_call(c, json_arguments) for c in message.tool_calls]
                out[-1]["tool_calls"] = special.escape_all(calls)
        return out

    def dict_of(self, role: str, content: str, reasoning: str) -> dict[str, Any]:
        """Return one message as templates read it; reasoning they would not show goes before the content."""
        if not reasoning:
            return {"role": role, "content": content}
        if not self._takes_reasoning:
            before, after = INLINE.split("{}")
            return {"role": role, "content": before + reasoning + after + content}
        return {"role": role, "content": content} | dict.fromkeys(REASONING_KEYS, reasoning)


def _dated(source: str, date: str) -> str:
    """Return a template that writes a day where it would write today's; `apply_chat_template` takes no other clock.

    Raises:
        ModelError: it asks for the date by a format that is no literal.
    """
    day = datetime.fromisoformat(date)
    dated, count = NOW.subn(lambda call: repr(day.strftime(call.group(2))), source)
    if count != source.count("strftime_now("):
        raise ModelError(
            "the chat template writes today's date by a format that cannot be read from its text, so that no two runs "
            "would see the same tokens. Choose another template_name."
        )
    return dated


def _call(call: Mapping[str, Any], as_json: bool) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping):
        return {**call}
    arguments = function.get("arguments")
    if isinstance(arguments, str) and not as_json:
        with contextlib.suppress(ValueError):  # not JSON: the template gets what the record holds
            arguments = json.loads(arguments)
    elif as_json and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}
