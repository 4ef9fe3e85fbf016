"""Turns: lists of messages as the usual corpora write them, checked and put into one form."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from sftx.data.jsontext import no_constant, strict_object
from sftx.data.record import Message, Role
from sftx.errors import did_you_mean

ROLE_NAMES: dict[str, Role] = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "function_call": "assistant", "tool": "tool", "observation": "tool",
}  # fmt: skip
TURN_KEYS = {"role": ("role", "from"), "content": ("content", "value"), "reasoning": ("reasoning_content", "reasoning")}


class RowError(Exception):
    """What is wrong with a row; the text is the reason."""


def show(value: object) -> str:
    """Quote the beginning of a value."""
    try:
        text = json.dumps(value, ensure_ascii=False)
        text.encode("utf-8")
    except (TypeError, ValueError):
        text = ascii(value)
    return text if len(text) <= 40 else text[:40]


def is_sound(text: str) -> bool:
    """Tell whether text can be trained on and written: no NUL, no half of a surrogate pair."""
    if "\0" in text:
        return False
    try:
        text.isascii() or text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def text_of(value: object, what: str) -> str:
    """Return a value that must be text."""
    if not isinstance(value, str):
        raise RowError(f"{what} is {show(value)}, not a string; write it as a string")
    if not is_sound(value):
        raise RowError(f"{what} holds \\u0000 or half a surrogate pair (\\ud800 to \\udfff); delete that escape")
    return value


def filled(text: str, what: str) -> str:
    """Return text that is not blank."""
    if not text.strip():
        raise RowError(f"{what} is {'only white space' if text else 'empty'}; fill it or delete the row")
    return text


def parsed(value: object, what: str) -> Any:
    """Return a value that may be written as JSON in a cell; an empty cell is nothing."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value, object_pairs_hook=strict_object, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{what} is not JSON: {error}; write it as JSON (strings in double quotes)") from None


def weight_of(value: object, what: str) -> float | None:
    """Return a weight; a cell of text may hold it."""
    number: object = value
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            number = None
    elif value is None:
        return None
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number) or number < 0:
        raise RowError(f"{what} is {show(value)}; wanted a number from 0 up")
    return float(number)


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
        raise RowError(f"{what} holds {show(one)}; wanted an object with a `name`, or with a `function` that has one")
    if wanted and function.get(wanted) is None:
        raise RowError(f"{what}: the call of `{function['name']}` has no `{wanted}`; add it ({{}} when there are none)")
    if wanted and isinstance(function[wanted], str):
        parsed(function[wanted], f"{what}: `{wanted}`")
    if not is_sound(json.dumps(function, ensure_ascii=False, default=str)):
        raise RowError(f"{what} holds half a surrogate pair (\\ud800 to \\udfff); delete that escape")
    return dict(one) if "function" in one else {"type": "function", "function": dict(function)}


def turns_of(value: object, what: str, columns: Mapping[str, str | None]) -> list[Message]:
    """Return the messages of a list of turns, with the names of OpenAI, of ShareGPT or those mapped."""
    found = parsed(value, what)
    if not isinstance(found, list) or not found:
        raise RowError(f"{what} is {show(found)}; wanted a list of turns, each with a role and its text")
    messages: list[Message] = []
    for place, turn in enumerate(found, 1):
        messages.append(_turn(turn, f"turn {place} of {what}", columns, messages))
    return messages


def pairs_of(value: object, what: str) -> list[Message]:
    """Return the messages of Firefly's list of pairs."""
    found = parsed(value, what)
    if not isinstance(found, list) or not found:
        raise RowError(f"{what} is {show(found)}; wanted a list of objects with `human` and `assistant`")
    messages = []
    for place, turn in enumerate(found, 1):
        where = f"turn {place} of {what}"
        if not isinstance(turn, dict):
            raise RowError(f"{where} is {show(turn)}, not an object")
        keys = {str(key).casefold(): key for key in turn}
        weight = weight_of(turn.get("weight"), f"{where}: `weight`")
        for name, role in (("human", "user"), ("assistant", "assistant")):
            if name not in keys:
                raise RowError(f"{where} has no `{name}`.{did_you_mean(name, map(str, turn))} Found {_names(turn)}")
            text = text_of(turn[keys[name]], f"{where}: `{name}`")
            learned = weight if role == "assistant" else None
            messages.append(Message(role, filled(text, f"{where}: `{name}`"), learned))  # type: ignore[arg-type]
    return messages


def history_of(value: object) -> list[Message]:
    """Return the messages of Alpaca's earlier rounds: a list of [question, answer]."""
    found = parsed(value, "`history`")
    messages = []
    for place, round_ in enumerate(found or [], 1) if isinstance(found, list | None) else [(1, found)]:
        where = f"round {place} of `history`"
        if not isinstance(round_, list) or len(round_) != 2:
            raise RowError(f"{where} is {show(round_)}; wanted a list of [question, answer]")
        messages.append(Message("user", filled(text_of(round_[0], where), where)))
        messages.append(Message("assistant", filled(text_of(round_[1], where), where)))
    return messages


def _names(turn: Mapping[Any, object]) -> str:
    return ", ".join(f"`{key}`" for key in turn) or "none"


def _key(turn: Mapping[str, object], field: str, columns: Mapping[str, str | None], where: str) -> str | None:
    """Return the key of a turn that holds a field, in any case."""
    mapped = columns.get(field)
    wanted = (mapped,) if mapped else TURN_KEYS[field]
    for name in wanted:
        if name in turn:
            return name
    lowered = {str(key).casefold(): key for key in turn}
    for name in wanted:
        if name.casefold() in lowered:
            return lowered[name.casefold()]
    if field == "role":
        raise RowError(f"{where} has no `{wanted[0]}`.{did_you_mean(wanted[0], map(str, turn))} Found {_names(turn)}")
    return None


def _turn(turn: object, where: str, columns: Mapping[str, str | None], before: list[Message]) -> Message:
    if not isinstance(turn, dict):
        raise RowError(f"{where} is {show(turn)}, not an object with a role and its text")
    called = turn[_key(turn, "role", columns, where) or ""]
    name = called.casefold() if isinstance(called, str) else ""
    role = ROLE_NAMES.get(name)
    if role is None:
        hint = did_you_mean(name, ROLE_NAMES)
        raise RowError(f"{where}: the role is {show(called)}; wanted one of {', '.join(ROLE_NAMES)}.{hint}")
    key = _key(turn, "content", columns, where)
    content = turn[key] if key else None
    weight = weight_of(turn.get("weight"), f"{where}: `weight`")
    if name == "function_call":
        return Message(role, "", weight, tool_calls=calls_of(content, where))
    calls = calls_of(turn.get("tool_calls"), f"{where}: `tool_calls`")
    if calls and role != "assistant":
        raise RowError(f"{where}: only an assistant has `tool_calls`, this is {name}")
    if key is None and not calls:
        wanted = columns.get("content") or TURN_KEYS["content"][0]
        raise RowError(f"{where} has no `{wanted}`.{did_you_mean(wanted, map(str, turn))} Found {_names(turn)}")
    text = "" if content is None and calls else text_of(_joined(content, where), where)
    if role in ("user", "assistant") and not calls:
        filled(text, where)
    thinking = _key(turn, "reasoning", columns, where) if role == "assistant" else None
    reasoning = turn[thinking] if thinking else None
    reasoning = None if reasoning is None else text_of(reasoning, f"{where}: `{thinking}`")
    return Message(role, text, weight, reasoning, calls, _tool_name(turn, role, where, before))


def _joined(content: object, where: str) -> object:
    """Return the text of content that is written as parts."""
    if not isinstance(content, list):
        return content
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
    if not content or not all(isinstance(text, str) for text in texts):
        raise RowError(f"{where}: the content is {show(content)}; only parts of type `text` can be trained on")
    return "".join(text for text in texts if text)


def _tool_name(turn: Mapping[str, Any], role: Role, where: str, before: list[Message]) -> str | None:
    """Return which tool a turn answers for: it says so, or names the call."""
    if role != "tool":
        return None
    if turn.get("name") is not None:
        return text_of(turn["name"], f"{where}: `name`")
    wanted = turn.get("tool_call_id")
    calls = (call for message in reversed(before) for call in message.tool_calls)
    return next((call["function"]["name"] for call in calls if wanted is not None and call.get("id") == wanted), None)


def check_order(messages: list[Message]) -> None:
    """Raise when the turns do not follow each other as a conversation's do."""
    last = "nothing"
    for place, message in enumerate(messages, 1):
        role, where = message.role, f"turn {place} is {message.role}"
        if role == "system" and last != "nothing":
            raise RowError(f"{where}, after {last}; a system turn can only be the first")
        if role in ("assistant", "tool") and last in ("nothing", "system"):
            raise RowError(f"{where}, before any user turn; a conversation begins with the user")
        # Templates mark each change of speaker, so two turns of one are not what a model will ever be given.
        if role == last and role in ("user", "assistant"):
            raise RowError(f"turns {place - 1} and {place} are both {role}; join them or add the turn between")
        if role == "tool" and last == "user":
            raise RowError(f"{where}, after user; a tool answers an assistant's call")
        if role == "user" and last == "tool":
            raise RowError(f"{where}, after tool; the assistant speaks after a tool's answer")
        if last == "assistant" and messages[place - 2].tool_calls and role != "tool":
            raise RowError(f"{where}, after a call of a tool; the tool's answer comes next")
        last = role
    if last != "assistant":
        raise RowError(f"the last turn is {last}, no assistant turn follows to be learned; delete it or add the answer")
