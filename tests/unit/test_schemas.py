"""`sftx.data.records.schemas` and `turns`: rows of every schema become records, or are refused with their line."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from sftx.data.records.cells import RowError
from sftx.data.records.dialogue import turns_of
from sftx.data.records.read import FileReader, How, read_file
from sftx.data.records.record import Message, Record
from sftx.data.records.schemas import describe_columns
from sftx.errors import DataError

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def jsonl(folder: Path, *rows: object, name: str = "a.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def one(folder: Path, row: object, **how: Any) -> Record:
    (record,) = read_file(jsonl(folder, row), **how).records
    return record


def turns(record: Record) -> list[tuple[str, str]]:
    return [(m.role, m.content) for m in record.messages]


def refused(folder: Path, row: object, *fragments: str, **how: Any) -> None:
    """The row is refused at its line, and only it."""
    path = jsonl(folder, {}, row)
    path.write_text("\n" + json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_file(path, **how)
    message = str(caught.value)
    assert message.startswith(f"{path}:2: "), message
    assert "\n" not in message, message
    for fragment in fragments:
        assert fragment in message, message


QA = [("user", "q"), ("assistant", "a")]
CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("row", "schema", "wanted"),
    [
        ({"category": "c", "human": "q", "assistant": "a"}, "human_assistant", QA),
        ({"Assistant": "a", "CATEGORY": "c", "Human": "q"}, "human_assistant", QA),
        ({"category": "c", "human": "q", "assistant": "a", "system": "s"}, "human_assistant", [("system", "s"), *QA]),
        ({"instruction": "q", "output": "a"}, "alpaca", QA),
        ({"instruction": "q", "input": "", "output": "a", "system": "", "history": []}, "alpaca", QA),
        ({"instruction": "q", "input": None, "output": "a", "system": None, "history": None}, "alpaca", QA),
        ({"instruction": "q", "input": "more", "output": "a"}, "alpaca", [("user", "q\nmore"), ("assistant", "a")]),
        (
            {"instruction": "q", "output": "a", "system": "s", "history": [["h1", "r1"], ["h2", "r2"]]},
            "alpaca",
            [("system", "s"), ("user", "h1"), ("assistant", "r1"), ("user", "h2"), ("assistant", "r2"), *QA],
        ),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "sharegpt", QA),
        ({"conversations": [{"from": "User", "value": "q"}, {"FROM": "assistant", "Value": "a"}]}, "sharegpt", QA),
        (
            {"conversations": [{"from": "system", "value": "s"}, {"from": "user", "value": "q"}, {"from": "gpt", "value": "a"}]},
            "sharegpt",
            [("system", "s"), *QA],
        ),
        ({"system": "s", "conversations": CHAT}, "sharegpt", [("system", "s"), *QA]),
        ({"messages": CHAT}, "messages", QA),
        ({"Messages": json.dumps(CHAT)}, "messages", QA),
        ({"messages": [{"role": "developer", "content": ""}, *CHAT]}, "messages", [("system", ""), *QA]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, CHAT[1]]}, "messages", QA),
        ({"messages": [*CHAT, *CHAT]}, "messages", [*QA, *QA]),
        ({"conversation": [{"human": "q", "assistant": "a"}] * 2, "conversation_id": 7}, "firefly", [*QA, *QA]),
        ({"prompt": "q", "completion": "a"}, "prompt_completion", QA),
        ({"prompt": "q", "response": "a"}, "prompt_completion", QA),
        ({"question": "q", "Answer": "a", "system": "s"}, "prompt_completion", [("system", "s"), *QA]),
    ],
)  # fmt: skip
def test_each_shape_is_recognised(
    tmp_path: Path, row: dict[str, Any], schema: str, wanted: list[tuple[str, str]]
) -> None:
    reading = read_file(jsonl(tmp_path, row))
    (record,) = reading.records
    assert turns(record) == wanted
    assert reading.schema == schema
    assert record.category == ("c" if schema == "human_assistant" else "default")
    assert turns(one(tmp_path, row, schema=schema)) == wanted
    assert turns(one(tmp_path, row | {"category": "k", "note": [1]}, schema=schema)) == wanted


def test_several_shapes_in_one_row(tmp_path: Path) -> None:
    """The manual's columns win, then conversations; the others are extra."""
    row = {"category": "c", "human": "q", "assistant": "a", "messages": CHAT, "prompt": "p", "completion": "x"}
    record = one(tmp_path, row)
    assert turns(record) == QA
    assert record.extra == {"messages": CHAT, "prompt": "p", "completion": "x"}
    assert one(tmp_path, row, schema="prompt_completion").human == "p"
    assert one(tmp_path, {"prompt": "p", "response": "r", "messages": CHAT}).human == "q"


@pytest.mark.parametrize("keep", [True, False])
def test_everything_else_is_extra(tmp_path: Path, keep: bool) -> None:
    path = jsonl(tmp_path, {"messages": CHAT, "id": 7, "deep": {"a": [None, 1.5]}, "category": "c"})
    (record,) = FileReader(path, keep_columns=keep)
    assert record.extra == ({"id": 7, "deep": {"a": [None, 1.5]}} if keep else {})
    assert (record.category, record.line, record.source) == ("c", 1, "a")


def test_weights(tmp_path: Path) -> None:
    weighed = [CHAT[0], CHAT[1] | {"weight": 0}, CHAT[0], CHAT[1] | {"weight": 0.5}, CHAT[0], CHAT[1]]
    record = one(tmp_path, {"messages": weighed, "weight": 2})
    assert record.weight == 2.0
    assert [m.weight for m in record.messages] == [None, 0.0, None, 0.5, None, None]
    pair = {"human": "q", "assistant": "a", "Weight": 0.25}
    assert [m.weight for m in one(tmp_path, {"conversation": [pair | {"weight": 0.25}]}).messages] == [None, 0.25]
    path = tmp_path / "a.csv"
    path.write_text("category,human,assistant,weight\na,b,c,0.5\na,b,c,2\n", encoding="utf-8")
    assert [r.weight for r in read_file(path).records] == [0.5, 2.0]
    assert [r.extra for r in read_file(path, columns={"weight": None}).records] == [{"weight": "0.5"}, {"weight": "2"}]


@pytest.mark.parametrize("weight", [-1, "x", "", "nan", "-1", True, [1], "inf"])
def test_a_weight_is_a_number_from_0_up(tmp_path: Path, weight: object) -> None:
    refused(tmp_path, {"prompt": "q", "completion": "a", "weight": weight}, "`weight` is", "expected a number >= 0")
    messages = [CHAT[0], CHAT[1] | {"weight": weight}]
    refused(tmp_path, {"messages": messages}, "turn 2 of `messages`: `weight` is", "expected a number >= 0")


def test_tools_calls_and_thinking(tmp_path: Path) -> None:
    called = CALL | {"id": "c1"}
    record = one(
        tmp_path,
        {
            "tools": [TOOL, TOOL["function"]],
            "messages": [
                CHAT[0],
                {"role": "assistant", "content": None, "tool_calls": [called], "reasoning_content": "hm"},
                {"role": "tool", "content": "", "tool_call_id": "c1"},
                {"role": "assistant", "content": "a", "reasoning": "so"},
            ],
        },
    )
    assert record.tools == (TOOL, TOOL)
    assert record.messages[1:] == (
        Message("assistant", "", reasoning="hm", tool_calls=(called,)),
        Message("tool", "", name="add"),
        Message("assistant", "a", reasoning="so"),
    )
    shared = one(
        tmp_path,
        {
            "tools": json.dumps([TOOL["function"]]),
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": json.dumps(CALL["function"])},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "a"},
            ],
        },
    )
    assert shared.tools == (TOOL,)
    assert shared.messages[1:3] == (Message("assistant", "", tool_calls=(CALL,)), Message("tool", "2"))


# What other trainers write


@pytest.mark.parametrize(
    "names",
    [
        *(("prompt", answer) for answer in ("completion", "response", "answer", "output")),
        *(("query", answer) for answer in ("response", "answer")),
        *(("question", answer) for answer in ("answer", "response")),
        *(("instruction", answer) for answer in ("output", "response")),
        ("human", "assistant"),
        ("input", "output"),
        ("input", "target"),
    ],
)
def test_history_is_read_in_every_schema_of_one_question(tmp_path: Path, names: tuple[str, str]) -> None:
    row = {"category": "c", names[0]: "q", names[1]: "a"}
    before = [("user", "h"), ("assistant", "r")]
    for history in (
        [["h", "r"]],
        [{"human": "h", "assistant": "r"}],
        [{"role": "user", "content": "h"}, {"role": "assistant", "content": "r"}],
        json.dumps([["h", "r"]]),
    ):
        assert turns(one(tmp_path, row | {"history": history})) == [*before, *QA]
    for nothing in ([], None, ""):
        assert turns(one(tmp_path, row | {"history": nothing})) == QA


def test_context_of_an_instruction_and_a_system_prompt(tmp_path: Path) -> None:
    assert turns(one(tmp_path, {"instruction": "q", "context": "c", "response": "a", "category": "k"})) == [
        ("user", "q\nc"),
        ("assistant", "a"),
    ]
    for name in ("system_prompt", "system", "systemInstruction"):
        assert turns(one(tmp_path, {name: "s", "question": "q", "response": "a"})) == [("system", "s"), *QA]
    squad = {"context": "c", "question": "q", "answer": "a"}
    assert turns(one(tmp_path, squad)) == QA
    mapped = {"instruction": "question", "output": "answer", "input": "context"}
    assert turns(one(tmp_path, squad, columns=mapped))[0] == ("user", "q\nc")


def test_a_prompt_and_a_completion_of_turns(tmp_path: Path) -> None:
    """Of the prompt nothing is learned, as in TRL; a completion may be one turn, or repeat its prompt."""
    before = [{"role": "system", "content": "s"}, *CHAT, {"role": "user", "content": "q"}]
    wanted = (Message("system", "s"), Message("user", "q"), Message("assistant", "a", 0.0), *(Message(*m) for m in QA))
    for after in ([CHAT[1]], CHAT[1], "a", [*before, CHAT[1]]):
        assert one(tmp_path, {"prompt": before, "completion": after}).messages == wanted
    assert turns(one(tmp_path, {"prompt": "q", "completion": [CHAT[1]]})) == QA
    refused(tmp_path, {"prompt": before, "completion": CHAT}, "turns 4 and 5 are both user")
    call = {"role": "assistant", "tool_calls": [CALL]}
    assert one(tmp_path, {"prompt": before, "completion": [call], "tools": [TOOL]}).tools == (TOOL,)


@pytest.mark.parametrize(
    ("turn", "weight"),
    [
        ({"loss": False}, 0.0), ({"loss": True}, 1.0), ({"train": False}, 0.0), ({"train": "false"}, 0.0),
        ({"loss": 0}, 0.0), ({"loss_weight": 0.5}, 0.5), ({"loss_scale": 0.0}, 0.0), ({"Train": True, "weight": 2}, 2.0),
        ({"loss": None, "weight": None}, None),
    ],
)  # fmt: skip
def test_turns_that_are_marked_for_the_loss(tmp_path: Path, turn: dict[str, Any], weight: float | None) -> None:
    row = {"messages": [CHAT[0] | {"loss": False}, CHAT[1] | turn, *CHAT]}
    assert [m.weight for m in one(tmp_path, row).messages] == [None, weight, None, None]
    pair = {"conversation": [{"human": "q", "assistant": "a"} | turn]}
    assert [m.weight for m in one(tmp_path, pair).messages] == [None, weight]


@pytest.mark.parametrize(
    ("row", "weight"),
    [
        ({"loss": False}, 0.0), ({"train": 0}, 0.0), ({"train": True}, 1.0), ({"loss_weight": 0.5}, 0.5),
        ({"loss_scale": 2}, 2.0), ({"loss": 0.53}, 1.0), ({"train": "the 9:15"}, 1.0), ({"label": True}, 1.0),
        ({"label": 0}, 1.0), ({"label": "spam"}, 1.0), ({"loss": False, "weight": 0}, 0.0),
    ],
)  # fmt: skip
def test_rows_that_are_marked_for_the_loss(tmp_path: Path, row: dict[str, Any], weight: float) -> None:
    assert one(tmp_path, {"prompt": "q", "completion": "a"} | row).weight == weight


def test_marks_that_cannot_be_honoured_are_refused(tmp_path: Path) -> None:
    pair = {"prompt": "q", "completion": "a"}
    refused(tmp_path, pair | {"label": False}, "`label` is false", "on_bad_rows=skip", "data.columns={label:null}")
    assert one(tmp_path, pair | {"label": False}, columns={"label": None}).extra == {"label": False}
    refused(tmp_path, pair | {"loss": False, "weight": 1}, "`weight` 1, `loss` 0 contradict each other")
    refused(
        tmp_path, {"messages": [CHAT[0], CHAT[1] | {"loss": 0.5}]}, "turn 2 of `messages`: `loss` is 0.5; expected true"
    )
    refused(tmp_path, {"messages": [CHAT[0], CHAT[1] | {"loss": False, "train": True}]}, "contradict each other")
    refused(
        tmp_path,
        {"messages": [CHAT[0] | {"train": True}, CHAT[1]]},
        "turn 1",
        "only an assistant's turns are trained on",
    )


@pytest.mark.parametrize("turn", [{"mood": "x"}, {"prefix": False}, {"tools": [TOOL]}, {"value": "b"}, {"name": "Al"}])
def test_a_key_of_a_turn_that_is_not_used_is_refused(tmp_path: Path, turn: dict[str, Any]) -> None:
    (key,) = turn
    row = {"messages": [CHAT[0], CHAT[1] | turn]}
    refused(tmp_path, row, f"turn 2 of `messages` has `{key}`, which is not used", f"data.columns={{{key}:null}}")
    several = {"messages": [CHAT[0], CHAT[1] | turn | {"edited": True}]}
    refused(
        tmp_path, several, f"has `{key}`, `edited`, which are not used", f"'data.columns={{{key}:null,edited:null}}'"
    )
    assert turns(one(tmp_path, row, columns={key: None})) == QA
    for nothing in ("", None, [], {}):
        assert turns(one(tmp_path, {"messages": [CHAT[0], CHAT[1] | {key: nothing}]})) == QA
    assert turns(one(tmp_path, {"messages": [CHAT[0] | {"id": 7}, CHAT[1] | {"value": "a", "timestamp": 1}]})) == QA


@pytest.mark.parametrize("role", ["gpt", "chatgpt", "model", "Bot"])
def test_other_roles_of_an_assistant(tmp_path: Path, role: str) -> None:
    assert turns(one(tmp_path, {"conversations": [CHAT[0], {"from": role, "value": "a"}]})) == QA


@pytest.mark.parametrize(
    "roles", [("function_call", "observation"), ("tool_call", "tool_response"), ("tool_call", "tool")]
)
def test_a_call_as_a_turn_of_its_own(tmp_path: Path, roles: tuple[str, str]) -> None:
    """Several in a row are the calls of one turn, and so is one behind what the assistant said."""
    call = {"from": roles[0], "value": json.dumps(CALL["function"])}
    answer = {"from": roles[1], "value": "2"}
    row = {"conversations": [CHAT[0], {"from": "gpt", "value": "so"}, call, call, answer, answer, CHAT[1]]}
    assert one(tmp_path, row).messages == (
        Message("user", "q"), Message("assistant", "so", tool_calls=(CALL, CALL)), Message("tool", "2"),
        Message("tool", "2"), Message("assistant", "a"),
    )  # fmt: skip


def test_legacy_calls_and_tools_in_the_system_turn(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "function_call": CALL["function"], "tool_calls": None}
    result = {"role": "function", "name": "add", "content": "2"}
    legacy = one(tmp_path, {"messages": [CHAT[0], call, result, CHAT[1]], "functions": [TOOL["function"]]})
    assert legacy.tools == (TOOL,)
    assert legacy.messages[1:3] == (Message("assistant", "", tool_calls=(CALL,)), Message("tool", "2", name="add"))
    beside = one(tmp_path, {"messages": [CHAT[0], call | {"content": "so"}]}).messages[1]
    assert beside == Message("assistant", "so", tool_calls=(CALL,))
    system = {"role": "system", "content": "s", "tools": json.dumps([TOOL])}
    assert one(tmp_path, {"messages": [system, *CHAT]}).tools == (TOOL,)
    assert one(tmp_path, {"messages": [system, *CHAT], "tools": [TOOL]}).tools == (TOOL,)
    other = TOOL | {"function": {"name": "other"}}
    refused(tmp_path, {"messages": [system, *CHAT], "tools": [other]}, "tools are defined both")


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "f"}\n</tool_call>',
        '{"name": "f", "arguments": {}}',
        "so\nAction: f",
        "```python\n1+1\n```",
    ],
)
def test_a_result_needs_a_call_be_it_in_text(tmp_path: Path, text: str) -> None:
    called = {"role": "assistant", "content": text}
    assert one(tmp_path, {"messages": [CHAT[0], called, {"role": "tool", "content": "1"}, CHAT[1]]})


@pytest.mark.parametrize("text", ["a", "", " ", "\0", "\ud800", "<think>x</think>a"])
@pytest.mark.parametrize("role", ["system", "user", "assistant", "gpt", "tool", "tool_call", "nobody"])
@pytest.mark.parametrize("names", [("role", "content"), ("from", "value")])
def test_a_turn_of_two_keys_is_read_as_any_other(role: str, text: str, names: tuple[str, str]) -> None:
    """Such turns have a way of their own, for speed."""

    def found(more: dict[str, Any]) -> object:
        try:
            return turns_of([{names[0]: role, names[1]: text} | more], "x", {})
        except RowError as error:
            return str(error)

    assert found({}) == found({"id": 1})


def test_thinking_of_a_turn(tmp_path: Path) -> None:
    for key in ("thinking", "reasoning", "reasoning_content"):
        assert one(tmp_path, {"messages": [CHAT[0], CHAT[1] | {key: "X"}]}).messages[1] == Message(
            "assistant", "a", reasoning="X"
        )
    inline = {"role": "assistant", "content": "<think>\nX\n</think>\n\na"}
    both = {"messages": [CHAT[0], inline | {"reasoning_content": "X\n"}]}
    assert one(tmp_path, both).messages[1] == Message("assistant", "a", reasoning="X\n")
    none = {"role": "assistant", "content": "<think>\n\n</think>\n\na", "thinking": "X"}
    assert one(tmp_path, {"messages": [CHAT[0], none]}).messages[1] == Message("assistant", "a", reasoning="X")
    refused(
        tmp_path,
        {"messages": [CHAT[0], inline | {"thinking": "Y"}]},
        "`thinking` and the text's own <think> block differ",
    )
    refused(tmp_path, {"messages": [CHAT[0], CHAT[1] | {"thinking": "X", "reasoning": "Y"}]}, "`thinking`")
    refused(tmp_path, {"messages": [CHAT[0] | {"thinking": "X"}, CHAT[1]]}, "turn 1", "`thinking`")


def test_parts_of_other_apis(tmp_path: Path) -> None:
    axolotl = [{"role": t["role"], "content": [{"type": "text", "value": t["content"]}]} for t in CHAT]
    bedrock = [{"role": t["role"], "content": [{"text": t["content"]}]} for t in CHAT]
    gemini = [{"role": r, "parts": [{"text": t["content"]}]} for r, t in zip(("user", "model"), CHAT, strict=True)]
    assert turns(one(tmp_path, {"messages": axolotl})) == QA
    assert turns(one(tmp_path, {"messages": bedrock, "system": [{"text": "s"}]})) == [("system", "s"), *QA]
    assert turns(one(tmp_path, {"contents": gemini, "systemInstruction": {"parts": [{"text": "s"}]}})) == [
        ("system", "s"),
        *QA,
    ]
    for part, name, advice in (
        ({"type": "tool_use", "name": "f", "input": {}}, "tool_use", "`tool_calls`"),
        ({"toolUse": {"name": "f"}}, "toolUse", "`tool_calls`"),
        ({"functionCall": {"name": "f"}}, "functionCall", "`tool_calls`"),
        ({"type": "thinking", "thinking": "X"}, "thinking", "`reasoning_content`"),
        ({"inline_data": {"data": "x"}}, "inline_data", "on_bad_rows=skip"),
        ({"type": "text", "text": "a", "value": "b"}, "text", "only text is read"),
    ):
        turn = {"role": "assistant", "content": [part]}
        refused(tmp_path, {"messages": [CHAT[0], turn]}, f"a part of type `{name}`", advice)


@pytest.mark.parametrize(
    ("row", "mapping"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, {"completion": "chosen"}),
        ({"instruction": "q", "input": "", "chosen": "a", "rejected": "b"}, {"completion": "chosen"}),
        ({"conversations": CHAT[:1], "chosen": CHAT[1], "rejected": CHAT[1]}, {"prompt": "conversations", "completion": "chosen"}),
        ({"messages": CHAT[:1], "chosen": [CHAT[1]], "rejected": [CHAT[1]]}, {"prompt": "messages", "completion": "chosen"}),
        ({"prompt": "q", "chosen": CHAT, "rejected": CHAT}, {"completion": "chosen"}),
        ({"chosen": CHAT, "rejected": CHAT}, {"messages": "chosen"}),
    ],
)  # fmt: skip
def test_preference_data_is_named_with_the_way_to_train_on_the_better_answer(
    tmp_path: Path, row: dict[str, Any], mapping: dict[str, str | None]
) -> None:
    said = ",".join(f"{field}:{column}" for field, column in mapping.items())
    refused(tmp_path, row, "preference data", f"'data.columns={{{said}}}'")
    assert turns(one(tmp_path, row, columns=mapping)) == QA


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("weight", "heavy"),
        ("loss_scale", "high"),
        ("category", 7),
        ("system", 7),
        ("history", "none"),
        ("tools", "saw"),
    ],
)
def test_an_optional_column_of_another_meaning_can_be_ignored(tmp_path: Path, column: str, value: object) -> None:
    row = {"prompt": "q", "completion": "a", column: value}
    refused(tmp_path, row, f"`{column}`", f"or ignore the column with 'data.columns={{{column}:null}}'")
    assert turns(one(tmp_path, row, columns={column: None})) == QA


def test_a_problem_that_all_rows_have_is_written_out_once(tmp_path: Path) -> None:
    path = jsonl(tmp_path, *[{"prompt": "q", "chosen": "a", "rejected": "b"}] * 30)
    with pytest.raises(DataError) as caught:
        read_file(path)
    lines = str(caught.value).split("\n")
    assert "preference data" in lines[0]
    assert lines[1:] == [*(f"{path}:{line}: the same" for line in range(2, 21)), "and 10 more"]


def test_images_are_refused(tmp_path: Path) -> None:
    row = {"messages": CHAT, "images": ["a.jpg"]}
    refused(tmp_path, row, "`images` is filled, and sftx trains on text", "data.columns={images:null}")
    assert turns(one(tmp_path, row, columns={"images": None})) == QA
    assert turns(one(tmp_path, row | {"images": []})) == QA


def test_an_empty_category_is_none_of_its_own(tmp_path: Path) -> None:
    row = {"category": " ", "human": "q", "assistant": "a"}
    refused(tmp_path, row, "the `category` of this row is empty", "data.columns={category:null}")
    assert one(tmp_path, row, columns={"category": None}).category == "default"
    assert one(tmp_path, {"prompt": "q", "completion": "a", "category": ""}).category == "default"


@pytest.mark.parametrize(
    ("header", "mapping"),
    [
        ("human,assistant", "data.columns={category:null}"),
        ("问题,回答", "'data.columns={human:问题,assistant:回答,category:null}'"),
        ('"q, 1",2', '\'data.columns={human:"q, 1",assistant:"2",category:null}\''),
        ("category,human,asistant", "'data.columns={assistant:asistant}'"),
        ("prompt,reply", "'data.columns={completion:reply}'"),
        ("id,query,answers,tools", "'data.columns={response:answers}'"),
        ("id,q,a,b", "'data.columns={human:COLUMN,assistant:COLUMN,category:null}'"),
        ("user,assistant", "'data.columns={human:user,category:null}'"),
        ("text", "texts (`text`) alone are not trained on"),
    ],
)
def test_a_missing_column_leads_to_the_mapping(tmp_path: Path, header: str, mapping: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"{header}\n" + ",".join("x" * len(next(csv.reader([header])))) + "\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_file(path)
    assert mapping in str(caught.value)
    assert str(caught.value).count("\n") == 0


def test_an_error_about_some_rows_ends_with_how_to_leave_them_out(tmp_path: Path) -> None:
    good, bad = {"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": ""}
    with pytest.raises(DataError) as caught:
        read_file(jsonl(tmp_path, good, bad, bad))
    assert str(caught.value).split("\n")[2:] == ["to train without these rows set data.on_bad_rows=skip"]
    for rows in ([bad, bad], [good, {"prompt": "q", "completion": "a", "label": False}]):  # none is left; it is said
        with pytest.raises(DataError) as caught:
            read_file(jsonl(tmp_path, *rows))
        assert "to train without these rows" not in str(caught.value)
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\nq,a\nq,"b', encoding="utf-8")
    with pytest.raises(DataError, match=r"never closed.*(?<!skip)$"):  # of the whole file
        read_file(path)


def test_used_and_unused_columns_and_the_range_of_weights(tmp_path: Path) -> None:
    rows = [{"Question": "q", "answer": "a", "thought": "t", "weight": w, "label": "x", "id": None} for w in (0.5, 3)]
    reader = FileReader(jsonl(tmp_path, *rows))
    list(reader)
    assert describe_columns(reader.used.facts()) == (
        "Question as question, answer, weight; unused: `thought`, `label`, `id`; weights of rows: 0.5 to 3"
    )
    reader = FileReader(jsonl(tmp_path, {"messages": [*CHAT, CHAT[0], CHAT[1] | {"loss": False}], "train": True}))
    list(reader)
    assert describe_columns(reader.used.facts()) == "messages, train; weights of turns: 0; weights of rows: 1"


def test_a_conversation_in_a_cell(tmp_path: Path) -> None:
    out = io.StringIO(newline="")
    csv.writer(out).writerows([["messages", "tools"], [json.dumps(CHAT), ""], [json.dumps(CHAT), json.dumps([TOOL])]])
    path = tmp_path / "a.csv"
    path.write_text(out.getvalue(), encoding="utf-8", newline="")
    assert [turns(r) for r in read_file(path).records] == [QA, QA]
    assert [r.tools for r in read_file(path).records] == [(), (TOOL,)]
    path.write_text("messages\n\"[{'role': 'user'}]\"\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"a.csv:2: `messages` is not JSON: .*strings in double quotes"):
        read_file(path)


# Columns by a mapping


def test_columns_are_mapped(tmp_path: Path) -> None:
    row = {"问题": "q", "回答": "a", "类别": "c", "human": "no", "n": 1}
    record = one(tmp_path, row, columns={"human": "问题", "assistant": "回答", "category": "类别"})
    assert (turns(record), record.category, record.extra) == (QA, "c", {"human": "no", "n": 1})
    record = one(tmp_path, row, columns={"human": "问题", "assistant": "回答"})
    assert (turns(record), record.category) == (QA, "default")
    record = one(
        tmp_path,
        {"chat": [{"speaker": "user", "text": "q"}, {"Speaker": "gpt", "text": "a"}], "human": 1},
        columns={"messages": "Chat", "role": "speaker", "content": "text"},
    )
    assert turns(record) == QA
    assert turns(one(tmp_path, {"in": "q", "out": "a"}, columns={"prompt": "in", "completion": "out"})) == QA


@pytest.mark.parametrize("codec", ["utf-8", "gb18030", "utf-16-le", "utf-16-be", "utf-16"])
def test_mapped_columns_of_a_csv(tmp_path: Path, codec: str) -> None:
    text = "类别;问题;回答\n数学;请问一加一是多少，这个我不会的？;一加一等于二。\n"
    (tmp_path / "a.csv").write_bytes(text.encode(codec))
    columns = {"human": "问题", "assistant": "回答", "category": "类别"}
    reading = read_file(tmp_path / "a.csv", columns=columns)
    assert reading.records[0].assistant == "一加一等于二。"
    assert (reading.delimiter, reading.records[0].category, reading.encoding) == (";", "数学", codec)


def test_a_column_that_is_mapped_holds_nothing_else(tmp_path: Path) -> None:
    record = one(tmp_path, {"category": "q", "answer": "a"}, columns={"human": "category", "assistant": "answer"})
    assert (turns(record), record.category) == (QA, "default")


def test_category_null_says_that_there_is_none(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("human,assistant,category\nq,a,c\n", encoding="utf-8")
    (record,) = read_file(path, columns={"category": None}).records
    assert (record.category, record.extra) == ("default", {"category": "c"})


@pytest.mark.parametrize(
    ("columns", "schema", "fragments"),
    [
        ({"humman": "x"}, "auto", ["`humman`", "Did you mean `human`?"]),
        ({"human": "x", "messages": "y"}, "auto", ["no schema has all of human, messages"]),
        ({"human": "x"}, "messages", ["the schema messages has not all of human"]),
        ({"role": "x"}, "alpaca", ["the schema alpaca has not all of role"]),
        ({}, "alpacca", ["data.schema=alpacca", "Did you mean `alpaca`?"]),
    ],
)
def test_a_mapping_that_cannot_be(
    tmp_path: Path, columns: dict[str, str | None], schema: str, fragments: list[str]
) -> None:
    with pytest.raises(DataError) as caught:
        read_file(jsonl(tmp_path, {"x": "q"}), columns=columns, schema=schema)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_a_mapped_column_that_is_not_there(tmp_path: Path) -> None:
    row = {"问题1": "q", "回答": "a"}
    refused(tmp_path, row, "no key `问题`", "nearest is `问题1`", columns={"human": "问题", "assistant": "回答"})


# Refusals


@pytest.mark.parametrize(
    ("row", "fragments"),
    [
        ({"instruction": "q", "outptu": "a"}, ["no key `output`", "nearest is `outptu`"]),
        ({"prompt": "q", "completoin": "a"}, ["no key `completion`", "nearest is `completoin`"]),
        ({"instruction": " ", "output": "a"}, ["`instruction` of this row is only white space"]),
        ({"instruction": "q", "output": ""}, ["`output` of this row is empty"]),
        ({"instruction": "q", "output": 7}, ["`output` is 7, not a string"]),
        ({"instruction": "q", "output": "a", "input": 7}, ["`input` is 7, not a string"]),
        ({"instruction": "q", "output": "a", "system": {}}, ["`system` is {}, not a string"]),
        ({"instruction": "q", "output": "a", "history": "x"}, ["`history` is not JSON"]),
        ({"instruction": "q", "output": "a", "history": {"a": 1}}, ["`history` is", "[question, answer]"]),
        ({"instruction": "q", "output": "a", "history": [["b"]]}, ['round 1 of `history` is ["b"]']),
        ({"instruction": "q", "output": "a", "history": [["b", ""]]}, ["round 1 of `history` is empty"]),
        ({"prompt": "q\0", "completion": "a"}, ["`prompt` holds \\u0000 or half a surrogate pair"]),
        ({"prompt": "q", "completion": "\ud83d"}, ["`completion` holds \\u0000 or half a surrogate pair"]),
        ({"prompt": "q", "completion": "a", "category": 5}, ["`category` is 5, not a string"]),
        ({"conversation": []}, ["`conversation` is []", "expected a list of objects"]),
        ({"conversation": ["x"]}, ['round 1 of `conversation` is "x"; expected']),
        ({"conversation": [{"human": "q", "asistant": "a"}]}, ["has no `assistant`", "Did you mean `asistant`?"]),
        ({"conversation": [{"human": "q", "assistant": ""}]}, ["round 1 of `conversation`: `assistant` is empty"]),
        ({"messages": []}, ["`messages` is []; expected a list of turns"]),
        ({"messages": None}, ["`messages` is null; expected a list of turns"]),
        ({"messages": [5]}, ["turn 1 of `messages` is 5, not an object"]),
        ({"messages": [{"content": "q"}]}, ["turn 1 of `messages` has no `role`", "Found `content`"]),
        ({"messages": [{"role": "usr", "content": "q"}]}, ['the role is "usr"', "Did you mean `user`?"]),
        ({"messages": [{"role": None, "content": "q"}]}, ["the role is null"]),
        ({"messages": [{"role": "user", "contnet": "q"}]}, ["has no `content`", "Did you mean `contnet`?"]),
        ({"messages": [{"role": "user", "content": 5}]}, ["turn 1 of `messages` is 5, not a string"]),
        ({"messages": [{"role": "user", "content": " "}]}, ["turn 1 of `messages` is only white space"]),
        ({"messages": [CHAT[0], {"role": "assistant", "content": ""}]}, ["turn 2 of `messages` is empty"]),
        ({"messages": [CHAT[0], {"role": "assistant", "content": None}]}, ["turn 2 of `messages` is null"]),
        ({"messages": [CHAT[0], {"role": "assistant", "content": "\0"}]}, ["turn 2 of `messages` holds \\u0000"]),
        ({"messages": [CHAT[0], CHAT[1] | {"reasoning_content": 5}]}, ["`reasoning_content` is 5, not a string"]),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, ["a part of type `image_url`", "data.on_bad_rows=skip"]),
        ({"messages": [CHAT[0] | {"tool_calls": [CALL]}, CHAT[1]]}, ["only an assistant has `tool_calls`"]),
        ({"messages": [CHAT[0], {"role": "assistant", "tool_calls": [5]}]}, ["`tool_calls` holds 5"]),
        ({"messages": [CHAT[0], {"role": "assistant", "tool_calls": [{"name": "f"}]}]}, ["has no `arguments`"]),
        (
            {"messages": [CHAT[0], {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]},
            ["`arguments` is not JSON"],
        ),
        ({"messages": CHAT, "tools": "{"}, ["`tools` is not JSON"]),
        ({"messages": CHAT, "tools": [{"x": 1}]}, ['`tools` holds {"x": 1}']),
        ({"messages": [{"role": "system", "content": "s"}, *CHAT], "system": "t"}, ["both a `system` column and a system"]),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "x"}]}, ["is not JSON"]),
    ],
)  # fmt: skip
def test_refusals(tmp_path: Path, row: dict[str, Any], fragments: list[str]) -> None:
    refused(tmp_path, row, *fragments)


@pytest.mark.parametrize(
    ("roles", "fragment"),
    [
        ("a", "turn 1 is assistant, before any user turn"),
        ("au", "turn 1 is assistant, before any user turn"),
        ("sa", "turn 2 is assistant, before any user turn"),
        ("tua", "turn 1 is tool, before any user turn"),
        ("s", "the last turn is system"),
        ("u", "the last turn is user, no assistant turn follows"),
        ("uau", "the last turn is user"),
        ("uct", "the last turn is tool"),
        ("uua", "turns 1 and 2 are both user"),
        ("uaa", "turns 2 and 3 are both assistant"),
        ("usa", "turn 2 is system, after user; a system turn can only be the first"),
        ("ssua", "turn 2 is system, after system"),
        ("uta", "turn 2 is tool, after user"),
        ("uata", "turn 3 is tool, after an answer without a call"),
        ("uctua", "turn 4 is user, after tool"),
        ("ucua", "turn 3 is user, after a call of a tool"),
    ],
)
def test_the_order_of_turns(tmp_path: Path, roles: str, fragment: str) -> None:
    made = {
        "s": {"role": "system", "content": "s"},
        "u": {"role": "user", "content": "q"},
        "a": {"role": "assistant", "content": "a"},
        "c": {"role": "assistant", "tool_calls": [CALL]},
        "t": {"role": "tool", "content": "r"},
    }
    refused(tmp_path, {"messages": [made[role] for role in roles]}, fragment)
    for sound in ("ua", "sua", "uaua", "ucta", "uctta", "uctcta", "uc"):
        assert one(tmp_path, {"messages": [made[role] for role in sound]})


def test_what_the_first_row_calls_a_column_all_rows_call_it(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"Prompt": "q", "completion": "a"}, {"prompt": "q", "completion": "a"})
    with pytest.raises(DataError, match=r"a.jsonl:2: no key `Prompt`; found `prompt`"):
        read_file(path)
    rows = [{"prompt": "q", "completion": "a"}, {"completion": "a", "prompt": "q", "System": "s", "weight": 0.5}]
    records = read_file(jsonl(tmp_path, *rows)).records
    assert [(r.weight, len(r.messages)) for r in records] == [(1.0, 2), (0.5, 3)]


def test_a_first_row_without_a_shape_does_not_decide(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"x": 1}, {"messages": CHAT})
    skipped: list[tuple[int, str]] = []
    reader = FileReader(path, How(), on_skip=lambda line, _, reason: skipped.append((line, reason)))
    assert [turns(r) for r in reader] == [QA]
    assert reader.schema == "messages"
    assert {line for line, _ in skipped} == {1}
