"""Turns: lists of messages as the usual corpora write them, checked and put into one form."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sftx.data.records.cells import (
    FLAGS,
    WEIGHTS,
    RowError,
    filled,
    is_empty,
    is_valid_text,
    mapping,
    parsed,
    quoted,
    show,
    text_of,
    weight_from,
)
from sftx.data.records.record import Message, Role
from sftx.errors import did_you_mean

ROLE_NAMES: dict[str, Role] = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "bing": "assistant", "bard": "assistant",
    "function_call": "assistant", "tool_call": "assistant", "tool": "tool", "function": "tool",
    "observation": "tool", "tool_response": "tool", "function_response": "tool",
}  # fmt: skip
CALL_ROLES = ("function_call", "tool_call")
"""Roles whose text is a call, as JSON."""
TURN_KEYS = {
    "role": ("role", "from"),
    "content": ("content", "value", "parts"),
    "reasoning": ("reasoning_content", "reasoning", "thinking"),
}
TOOLS = ("tools", "functions")
METADATA = ("id", "tool_call_id", "timestamp", "cache_control")
"""Keys of a turn that change nothing that is trained on."""
INLINE_THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
CALL_IN_TEXT = re.compile(
    r"<\|?(tool|function|python|plugin|action)|\[TOOL_CALLS\]|^Action:|\"(name|arguments)\"\s*:|```", re.MULTILINE
)
"""What shows that an answer calls a tool in its text: a tag, ReAct's action, a call as JSON, code that is run."""


def calls_of(value: object, what: str) -> tuple[dict[str, Any], ...]:
    """Return an assistant's calls in OpenAI's form, from a list of them, one, or its JSON."""
    return tuple(_named(one, what, "arguments") for one in _listed(value, what))


def tools_of(value: object) -> tuple[dict[str, Any], ...]:
    """Return the definitions of tools in OpenAI's form."""
    return tuple(_named(one, "`tools`", None) for one in _listed(value, "`tools`"))


def _listed(value: object, what: str) -> list[Any]:
    found = parsed(value, what)
    if found is None:
        return []
    return found if isinstance(found, list) else [found]


def _named(one: Any, what: str, wanted: str | None) -> dict[str, Any]:
    function = one.get("function", one) if isinstance(one, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError(f"{what} holds {show(one)}; expected an object with a `name`, or with a `function` that has one")
    if wanted and function.get(wanted) is None:
        raise RowError(f"{what}: the call of `{function['name']}` has no `{wanted}`; add it ({{}} when there are none)")
    if wanted and isinstance(function[wanted], str):
        parsed(function[wanted], f"{what}: `{wanted}`")
    if not is_valid_text(json.dumps(function, ensure_ascii=False, default=str)):
        raise RowError(f"{what} holds half a surrogate pair (\\ud800 to \\udfff); delete that escape")
    return dict(one) if "function" in one else {"type": "function", "function": dict(function)}


class _Turn:
    """The keys of one turn, looked up in any case; those that nothing took are left over."""

    def __init__(self, turn: Mapping[str, Any], where: str, columns: Mapping[str, str | None]) -> None:
        self.where, self._turn, self._columns = where, turn, columns
        self._folded = [(key.casefold(), key) for key in turn]
        self._left = dict.fromkeys(turn)

    def take(self, *names: str) -> tuple[str | None, Any]:
        """Return the first of some keys that holds something, and its value; several must hold the same."""
        wanted = [name.casefold() for name in names]
        found = [(wanted.index(folded), key not in names, key) for folded, key in self._folded if folded in wanted]
        if not found:
            return None, None
        keys = [key for *_, key in sorted(found)]
        key = next((k for k in keys if not is_empty(self._turn[k])), keys[0])
        for other in keys:
            if is_empty(self._turn[other]) or self._turn[other] == self._turn[key]:
                self._left.pop(other, None)
        return key, self._turn[key]

    def field(self, field: str) -> tuple[str | None, Any]:
        """Take a field by the name that the mapping gives it, or by its usual names."""
        mapped = self._columns.get(field)
        return self.take(*((mapped,) if mapped else TURN_KEYS[field]))

    def lacks(self, field: str) -> RowError:
        """Return the error that a field is not there."""
        wanted = self._columns.get(field) or TURN_KEYS.get(field, (field,))[0]
        found = quoted(self._turn)
        return RowError(f"{self.where} has no `{wanted}`.{did_you_mean(wanted, self._turn)} Found {found}")

    def weight(self, supervised: bool) -> float | None:
        """Return the turn's own weight in the loss."""
        flags = {name: value for name in (*WEIGHTS, *FLAGS) if (value := self.take(name)[1]) is not None}
        weight = weight_from(flags, f"{self.where}: ")
        if weight and not supervised:
            raise RowError(
                f"{self.where}: `{next(iter(flags))}` asks to train on it; only an assistant's turns are trained on, "
                "so delete the key or set it to false"
            )
        return weight if supervised else None

    def check_all_used(self) -> None:
        """Raise RowError when keys that say something are left over."""
        left = [
            key
            for key in self._left
            if key not in METADATA and not is_empty(self._turn[key]) and self._columns.get(key, "") is not None
        ]
        if left:
            raise RowError(
                f"{self.where} has {quoted(left)}, which {'is' if len(left) == 1 else 'are'} not used here, such as "
                f"{show(self._turn[left[0]])}; to ignore what is not used set "
                f"{mapping(dict.fromkeys(left[:12]))}"
            )


Turns = tuple[list[Message], tuple[dict[str, Any], ...]]
"""Messages, and the tools that a system turn defines."""


def turns_of(value: object, what: str, columns: Mapping[str, str | None]) -> Turns:
    """Return the messages of a list of turns, with the names of OpenAI, of ShareGPT or those mapped."""
    found = parsed(value, what)
    if not isinstance(found, list) or not found:
        raise RowError(f"{what} is {show(found)}; expected a list of turns, each with a role and its text")
    messages: list[Message] = []
    tools: tuple[dict[str, Any], ...] = ()
    for place, turn in enumerate(found, 1):
        where = f"turn {place} of {what}"
        if not isinstance(turn, dict):
            raise RowError(f"{where} is {show(turn)}, not an object with a role and its text")
        if (plain := _plain(turn, where, columns)) is not None:
            messages.append(plain)
            continue
        keys = _Turn(turn, where, columns)
        message = _message(keys, messages)
        if message.role == "system":
            tools += tools_of(keys.take(*TOOLS)[1])
        keys.check_all_used()
        if _goes_on(messages, message):  # a call in a turn of its own belongs to what the assistant said before it
            last = messages.pop()
            message = replace(last, tool_calls=last.tool_calls + message.tool_calls)
        messages.append(message)
    return messages, tools


def _plain(turn: Mapping[str, Any], where: str, columns: Mapping[str, str | None]) -> Message | None:
    """Return what `_message` returns of a turn that has its role and a text and nothing else, as most have, sooner."""
    if len(turn) != 2 or "role" in columns or "content" in columns:
        return None
    called, text = (turn.get("role"), turn.get("content")) if "role" in turn else (turn.get("from"), turn.get("value"))
    if not isinstance(called, str) or not isinstance(text, str) or called in CALL_ROLES:
        return None
    role = ROLE_NAMES.get(called)
    if role is None:
        return None
    return Message(role, filled(text_of(text, where), where) if role in ("user", "assistant") else text_of(text, where))


def _goes_on(before: list[Message], message: Message) -> bool:
    """Return True for an assistant's turn that is only a call, right after another of its turns."""
    if not before or not message.role == before[-1].role == "assistant" or not message.tool_calls:
        return False
    return not message.content and message.reasoning is None and message.weight == before[-1].weight


def rounds_of(value: object, what: str, columns: Mapping[str, str | None]) -> Turns:
    """Return the messages of rounds: [question, answer], objects with `human` and `assistant`, or turns."""
    found = parsed(value, what)
    if found is None:
        return [], ()
    if not isinstance(found, list):
        raise RowError(f"{what} is {show(found)}; expected a list of [question, answer], or of turns")
    first = {str(key).casefold() for key in found[0]} if found and isinstance(found[0], dict) else set()
    roles = columns.get("role") or "role"
    if first & {"role", "from", roles.casefold()}:
        return turns_of(found, what, columns)
    messages = []
    for place, round_ in enumerate(found, 1):
        messages += _round(round_, f"round {place} of {what}", columns)
    return messages, ()


def _round(value: object, where: str, columns: Mapping[str, str | None]) -> list[Message]:
    """Return the question and the answer of one round."""
    weight = None
    if isinstance(value, list) and len(value) == 2:
        named = [(where, text) for text in value]
    elif isinstance(value, dict):
        keys = _Turn(value, where, columns)
        named = []
        for name in ("human", "assistant"):
            key, text = keys.take(name)
            if key is None:
                raise keys.lacks(name)
            named.append((f"{where}: `{name}`", text))
        weight = keys.weight(supervised=True)
        keys.check_all_used()
    else:
        raise RowError(f"{where} is {show(value)}; expected [question, answer], or an object with `human`, `assistant`")
    question, answer = (filled(text_of(text, name), name) for name, text in named)
    return [Message("user", question), Message("assistant", answer, weight)]


def _message(turn: _Turn, before: list[Message]) -> Message:
    """Return the message of a turn."""
    where = turn.where
    key, called = turn.field("role")
    if key is None:
        raise turn.lacks("role")
    name = called.casefold() if isinstance(called, str) else ""
    role = ROLE_NAMES.get(name)
    if role is None:
        hint = did_you_mean(name, ROLE_NAMES)
        raise RowError(f"{where}: the role is {show(called)}; expected one of {', '.join(ROLE_NAMES)}.{hint}")
    key, content = turn.field("content")
    weight = turn.weight(supervised=role == "assistant")
    if name in CALL_ROLES:
        return Message(role, "", weight, tool_calls=calls_of(content, where))
    calls: tuple[dict[str, Any], ...] = ()
    for field in ("tool_calls", "function_call"):
        calls += calls_of(turn.take(field)[1], f"{where}: `{field}`")
        if calls and role != "assistant":
            raise RowError(f"{where}: only an assistant has `{field}`, this is {name}")
    if key is None and not calls:
        raise turn.lacks("content")
    text = "" if content is None and calls else text_of(joined(content, where), where)
    reasoning = None
    if role == "assistant":
        key, thought = turn.field("reasoning")
        reasoning = None if thought is None else text_of(thought, f"{where}: `{key}`")
        text = _thought_once(text, reasoning, f"{where}: `{key}`")
    if role in ("user", "assistant") and not calls:
        filled(text, where)
    return Message(role, text, weight, reasoning, calls, _tool_name(turn, role, before))


def _thought_once(text: str, reasoning: str | None, what: str) -> str:
    """Return an answer without the thinking at its beginning that `reasoning` holds too."""
    inline = INLINE_THOUGHT.match(text) if reasoning and reasoning.strip() else None
    if inline is None:
        return text
    if inline[1].strip() not in ("", (reasoning or "").strip()):
        raise RowError(f"{what} and the text's own <think> block differ; keep one of the two")
    return text[inline.end() :]


def joined(content: object, where: str) -> object:
    """Return the text of content that is written as parts: of OpenAI, Anthropic, Bedrock or Gemini."""
    if not isinstance(content, list) or not content:
        return content
    return "".join(_part(part, where) for part in content)


def _part(part: object, where: str) -> str:
    if not isinstance(part, dict):
        raise RowError(f"{where}: the content holds {show(part)}; expected parts of type `text`, or one text")
    texts = [part[key] for key in ("text", "value") if part.get(key) is not None]
    others = [k for k, v in part.items() if k not in ("type", "text", "value", *METADATA) and not is_empty(v)]
    kind = part.get("type", "text")
    if kind == "text" and len(texts) == 1 and isinstance(texts[0], str) and not others:
        return texts[0]
    name = kind if kind != "text" else others[0] if others else "text"
    raise RowError(f"{where}: the content has a part of type `{name}`; only text is read. {_instead(str(name))}")


def _instead(kind: str) -> str:
    """Return what to do about a part that is no text."""
    folded = kind.casefold()
    if any(word in folded for word in ("tool", "function")):
        return "Write calls as `tool_calls` of the assistant, results as turns of the role `tool`"
    if "think" in folded or "reason" in folded or folded == "thought":
        return "Write thinking as `reasoning_content` of the turn"
    return "Leave such rows out with data.on_bad_rows=skip, or write the part as text"


def _tool_name(turn: _Turn, role: Role, before: list[Message]) -> str | None:
    """Return which tool a turn answers for: it says so, or names the call."""
    if role != "tool":
        return None
    name = turn.take("name")[1]
    if name is not None:
        return text_of(name, f"{turn.where}: `name`")
    wanted = turn.take("tool_call_id")[1]
    calls = (call for message in reversed(before) for call in message.tool_calls)
    return next((call["function"]["name"] for call in calls if wanted is not None and call.get("id") == wanted), None)


def check_order(messages: list[Message]) -> None:
    """Raise RowError when the turns do not follow each other as a conversation's do."""
    last = "nothing"
    for place, message in enumerate(messages, 1):
        role, where = message.role, f"turn {place} is {message.role}"
        if role == "system" and last != "nothing":
            raise RowError(f"{where}, after {last}; a system turn can only be the first")
        if role in ("assistant", "tool") and last in ("nothing", "system"):
            raise RowError(
                f"{where}, before any user turn; a conversation begins with the user: delete it, or add what it answers"
            )
        # Templates mark each change of speaker, so two turns of one are not what a model will ever be given.
        if role == last and role in ("user", "assistant"):
            raise RowError(f"turns {place - 1} and {place} are both {role}; join them or add the turn between")
        if role == "tool" and last == "user":
            raise RowError(f"{where}, after user; a tool answers an assistant's call")
        if role == "tool" and last == "assistant" and not _calls(messages[place - 2]):
            raise RowError(f"{where}, after an answer without a call; add the assistant's `tool_calls`, or delete it")
        if role == "user" and last == "tool":
            raise RowError(f"{where}, after tool; the assistant speaks after a tool's answer")
        if last == "assistant" and messages[place - 2].tool_calls and role != "tool":
            raise RowError(f"{where}, after a call of a tool; the tool's answer comes next")
        last = role
    if last != "assistant":
        raise RowError(
            f"the last turn is {last}, no assistant turn follows to be trained on; delete it or add the answer"
        )


def _calls(answer: Message) -> bool:
    """Return True when an answer calls a tool, be it in its text, as some corpora write it."""
    return bool(answer.tool_calls or CALL_IN_TEXT.search(answer.content))
