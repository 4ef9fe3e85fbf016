"""Supervised turns as text: each with the prompt that inference would render before it.

An assistant's turn is trained on after exactly what inference puts there: the conversation so far, rendered
with a generation prompt. Turns whose prompts continue one another share a row; where the template renders
earlier turns differently later on (Qwen3 leaves out their thinking), each supervised turn has its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sftx.data.encode.render import Marks, Renderer
from sftx.data.encode.special_tokens import SpecialTokens
from sftx.errors import ModelError

OPEN_THINK = re.compile(r"<think>\n*$")
NO_THOUGHT = r"(?:<think>\s*</think>\s*|<\|channel>thought\s*<channel\|>|<\|START_THINKING\|><\|END_THINKING\|>)"
"""An empty block of thinking, as a prompt writes it where the model shall not think."""
WRITTEN_NO_THOUGHT = rf"(?:<think>\s*)?</think>\n*|{NO_THOUGHT}"
"""... and what templates write of it in a finished conversation."""


@dataclass(frozen=True)
class Turn:
    """One supervised turn: what inference puts before it, and what the model shall say, with the end of its turn."""

    index: int
    prompt: str
    answer: str
    marks: Marks | None = None
    """The parts of the answer that the template marks as supervised; None is all of it."""

    @property
    def text(self) -> str:
        """All of it."""
        return self.prompt + self.answer


class Piece(NamedTuple):
    """A turn as the texts that are tokenised; each but the first begins with the special token before it.

    Control tokens cut a text cleanly: what stands between two is tokenised alike in any surroundings.
    """

    head: str
    """From the end of the turn before up to the last special token before the answer."""
    tail: str
    """From that special token up to the answer."""
    joint: str
    """From that special token to the end of the turn."""
    cut: bool
    """True when `tail` and `joint` begin with a special token that `head` ends with."""
    continues: bool
    """True when `head` begins with the special token that ended the turn before."""
    swallows: bool
    """True when the token before the answer takes white space behind it: an answer's own is not its to take."""
    message: int
    """The turn's number in the conversation."""
    marks: Marks | None
    """The parts of the answer that the template marks as supervised; None is all of it."""

    @property
    def answer(self) -> str:
        """What is supervised."""
        return self.joint[len(self.tail) :]


class TurnReader:
    """Finds the supervised turns of one conversation."""

    def __init__(
        self,
        renderer: Renderer,
        stop_tokens: Sequence[str],
        special: SpecialTokens,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.renderer, self.tools = renderer, tools
        self.stop_tokens = stop_tokens
        self.special = special.pattern
        self.cuts = special.cuts

    def turn(self, messages: list[dict[str, Any]], index: int) -> Turn:
        """Return the turn at `index`: its prompt and its answer.

        A template's switch for thinking is on when the turn has reasoning, and off when it has none: then the
        empty thinking that it writes belongs to the prompt, as at inference without thinking.

        Raises:
            ModelError: no text is common to training and inference.
        """
        message = messages[index]
        thinking = None
        if self.renderer.thinking_switch:
            thinking = _thinks(message)
        prompt, completion, marks = self.rendered(messages, index, thinking)
        kept = self._kept(messages, index, prompt, completion, thinking)
        if marks is not None:
            marks = _within(marks, len(prompt), self._end_of(kept), len(kept))
        return Turn(index, prompt, kept, marks)

    def rendered(
        self, messages: list[dict[str, Any]], index: int, thinking: bool | None
    ) -> tuple[str, str, Marks | None]:
        """Render up to an answer: what stands before it, what follows, and the template's marks."""
        whole, marks = self._render(messages[: index + 1], generation_prompt=False, thinking=thinking)
        prompt = ""
        for switch in dict.fromkeys((thinking, None)):
            prompt, _ = self._render(messages[:index], generation_prompt=True, thinking=switch)
            if whole.startswith(prompt):
                return prompt, whole[len(prompt) :], marks
            empty = re.search(f"{NO_THOUGHT}$", prompt)
            if empty and not _thinks(messages[index]) and whole.startswith(prompt[: empty.start()]):
                answer = re.sub(f"^(?:{WRITTEN_NO_THOUGHT})", "", whole[empty.start() :])
                shift = len(prompt) + len(answer) - len(whole)
                return prompt, answer, marks and [(start + shift, end + shift) for start, end in marks]
        opened = OPEN_THINK.search(prompt)
        if opened and whole.startswith(prompt[: opened.start()]):
            return prompt, self._closed(messages[index], whole[opened.start() :]), None
        if (follows := self._after_other_history(messages, index, whole, prompt)) is not None:
            return prompt, follows, None
        raise ModelError(
            "the chat template renders another text before the answer in training than at inference, so what is "
            f"learned would never be generated. Prompt ends with {prompt[-40:]!r}; choose another template_name."
        )

    def _render(
        self, messages: list[dict[str, Any]], *, generation_prompt: bool, thinking: bool | None
    ) -> tuple[str, Marks | None]:
        return self.renderer.render(messages, generation_prompt=generation_prompt, tools=self.tools, thinking=thinking)

    def _after_other_history(self, messages: list[dict[str, Any]], index: int, whole: str, prompt: str) -> str | None:
        """Return the answer where the template renders earlier turns otherwise once it is there, as gpt-oss's does.

        It follows the message before it, rendered as at inference; the prompt stays what inference sees.
        """
        if index < 2:
            return None
        before, _ = self._render(messages[: index - 1], generation_prompt=False, thinking=None)
        if not prompt.startswith(before) or len(prompt) == len(before):
            return None
        _, found, rest = whole.rpartition(prompt[len(before) :])
        return rest if found else None

    def _closed(self, message: dict[str, Any], rest: str) -> str:
        """Finish the thinking that a prompt opens (DeepSeek-R1's), where the template leaves it out of an answer."""
        if rest.startswith("<think>"):  # it is there, only with other white space
            return rest.removeprefix("<think>").lstrip("\n")
        if "reasoning_content" in message:
            thought = message["reasoning_content"]
        elif "</think>" in message["content"]:
            thought = message["content"].partition("</think>")[0].rpartition("<think>")[2]
        else:
            thought = ""
        return thought.strip("\n") + "\n</think>\n\n" + rest.lstrip("\n")

    def _kept(
        self, messages: list[dict[str, Any]], index: int, prompt: str, completion: str, thinking: bool | None
    ) -> str:
        """Return a completion up to and with the token that ends the turn."""
        start = 0
        for cell in ("reasoning_content", "content"):
            start = _end_of_cell(completion, messages[index].get(cell, ""), start) or start
        end = next((m for m in self.special.finditer(completion, start) if m.group() in self.stop_tokens), None)
        if end is not None:
            return completion[: end.end()]
        kept = completion[:start] + completion[start:].rstrip()
        return kept + self._next_stop(messages, index, prompt, kept, thinking)

    def _next_stop(
        self, messages: list[dict[str, Any]], index: int, prompt: str, kept: str, thinking: bool | None
    ) -> str:
        """Return what ends a turn that the template does not end: the token of the next speaker, as GLM's.

        Nothing after another special token: then the template does end the turn, at a token that stops nothing.
        """
        text = "Question"
        calls = messages[index].get("tool_calls")
        role = messages[index + 1]["role"] if index + 1 < len(messages) else "tool" if calls else "user"
        speaks: dict[str, Any] = {"role": role, "content": text}
        if calls:
            speaks["name"] = calls[-1].get("function", calls[-1])["name"]
        try:
            longer, _ = self._render([*messages[: index + 1], speaks], generation_prompt=False, thinking=thinking)
        except ModelError:
            longer = ""
        before, after = (
            [t for t in self.special.findall(rendered) if t in self.stop_tokens]
            for rendered in (prompt, longer.rpartition(text)[0])
        )
        if len(after) > len(before):
            return after[-1]
        return "" if last_cut(kept, self.special) else self.stop_tokens[0]

    def _end_of(self, answer: str) -> int:
        """Return where an answer's last special token begins."""
        return max((m.start() for m in self.special.finditer(answer)), default=len(answer))

    def rows(self, turns: Sequence[Turn]) -> list[list[Turn]]:
        """Put turns whose texts continue one another into one row."""
        rows: list[list[Turn]] = []
        for turn in turns:
            before = rows[-1][-1] if rows else None
            if before and last_cut(before.answer, self.cuts) and turn.prompt.startswith(before.text):
                rows[-1].append(turn)
            else:
                rows.append([turn])
        return rows


def _end_of_cell(text: str, cell: str, start: int) -> int | None:
    """Return where a cell ends in rendered text, also when the template trimmed it; None when it is not there."""
    if not cell.strip():
        return None  # white space is everywhere
    for spelled in (cell, cell.strip()):
        place = text.find(spelled, start)
        if place >= 0:
            return place + len(spelled)
    return None


def _thinks(message: dict[str, Any]) -> bool:
    return "reasoning_content" in message or "</think>" in message["content"]


def _within(marks: Marks, start: int, end: int, length: int) -> Marks | None:
    """Return marks relative to an answer, None when they cover it; its last token, from `end`, is always supervised."""
    inside: Marks = []
    for a, b in sorted((max(a - start, 0), min(b - start, end)) for a, b in marks):
        if inside and a <= inside[-1][1]:
            inside[-1] = (inside[-1][0], max(b, inside[-1][1]))
        elif a < b:
            inside.append((a, b))
    if inside in ([], [(0, end)]):
        return None
    return [*inside, (end, length)]


def pieces(row: Sequence[Turn], special: SpecialTokens) -> list[Piece]:
    """Cut a row's text at special tokens into what is tokenised."""
    out: list[Piece] = []
    done, last = "", ""
    for turn in row:
        between = turn.prompt[len(done) :]
        found = list(special.cuts.finditer(between))
        if found:
            head, token, rest = last + between[: found[-1].end()], found[-1].group(), between[found[-1].end() :]
        else:
            head, token, rest = "", last, between
        swallows = token in special.swallowing and not rest.strip()
        tail = token + rest
        out.append(
            Piece(head, tail, tail + turn.answer, bool(token), bool(last and head), swallows, turn.index, turn.marks)
        )
        done, last = turn.text, last_cut(turn.answer, special.cuts)
    return out


def last_cut(text: str, cuts: re.Pattern[str]) -> str:
    """Return the special token that a text ends with, or nothing."""
    found = list(cuts.finditer(text))
    return found[-1].group() if found and found[-1].end() == len(text) else ""
