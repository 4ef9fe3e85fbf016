"""`sftx data check` and `sftx data convert`, and the policies of group `data` as a run obeys them."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from sftx.cli import run as sftx
from sftx.commands import data_check
from sftx.data.records.audit import language_of
from sftx.errors import ConfigError, DataError, ModelError
from sftx.run import run

ROWS = [
    ("code", "print hello in python", "print('hello')"),
    ("code", "print hello in python", "print('hello')"),
    ("code", "print hello in python", "puts 'hello'"),
    ("chat", "\u4f60\u597d\u5417\uff1f", "\u6211\u5f88\u597d\u3002"),
    ("chat", "name a colour", "blue " * 60),
    *(("more", f"question {i}", f"answer {i}") for i in range(7)),
]


def write(path: Path, rows: list[tuple[str, str, str]]) -> Path:
    lines = [json.dumps(dict(zip(("category", "human", "assistant"), r, strict=True))) for r in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write(tmp_path / "corpus.jsonl", ROWS)


def checked(capsys: pytest.CaptureFixture[str], *words: object) -> dict:
    assert sftx(["data", "check", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_check_finds_what_is_in_a_corpus(corpus: Path, tmp_path: Path, capsys) -> None:
    held = write(tmp_path / "held.jsonl", [("code", "Print  HELLO in Python", "x"), ("code", "unseen", "y")])
    found = checked(capsys, corpus, "--eval", held, "max_seq_length=64")
    assert (found["records"], found["rows"]) == (12, 12)
    assert found["duplicates"] == [f"{corpus}:2: is {corpus}:1 again"]
    assert found["conflicts"] == [f"{corpus}:1 and {corpus}:3"]
    assert found["leaks"] == [f"{held}:1: its question is trained on, {corpus}:1"]
    assert [t.split(": ")[0] for t in found["truncated"]] == [f"{corpus}:5"]
    assert found["categories"]["chat"]["languages"] == {"zh": 1, "latin": 1}
    lengths = found["lengths"]
    assert sum(count for *_, count in lengths["histogram"]) == 12
    assert lengths["covered"] == pytest.approx(11 / 12)
    assert lengths["proposed"] >= lengths["p99"]


def test_check_shows_what_is_learned_and_draws(corpus: Path, tmp_path: Path, capsys) -> None:
    png = tmp_path / "lengths.png"
    assert sftx(["data", "check", str(corpus), "--show", "12", "--png", str(png)]) == 0
    shown = capsys.readouterr().out
    assert "<|im_start|>user" in shown
    assert "puts 'hello'<|im_end|>" in shown
    assert "duplicates: 1" in shown
    assert png.read_bytes().startswith(b"\x89PNG")


def test_check_says_that_matplotlib_is_missing_before_it_reads(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_check, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install matplotlib"):
        sftx(["data", "check", str(corpus.parent / "no.jsonl"), "--png", "x.png"])


def test_check_follows_the_policies_of_a_run(corpus: Path, capsys) -> None:
    found = checked(capsys, corpus, "data.duplicates=drop_exact", "data.cap_per_category=3")
    assert found["rows"] == 2 + 2 + 3
    assert len(found["left_out"]) == 5


def test_check_refuses_what_a_run_would_refuse(tmp_path: Path) -> None:
    bad = write(tmp_path / "bad.jsonl", [("a", "q", "x"), ("a", "q2", "")])
    with pytest.raises(DataError, match=r"bad\.jsonl:2: .*empty"):
        sftx(["data", "check", str(bad)])
    with pytest.raises(ConfigError, match="max_seq_length"):
        sftx(["data", "check", str(bad), "max_seq_lenght=3"])
    with pytest.raises(ConfigError, match="name the files themselves"):
        sftx(["data", "check", str(bad), "train_file_name=x.csv"])


def test_check_looks_at_what_the_template_makes_of_every_row(corpus: Path, capsys) -> None:
    """qwen3's takes the first part of this answer for thinking."""
    rows = [*ROWS * 100, ("code", "what is a tag", "one </think> two </think> three")]
    write(corpus, rows)
    with pytest.raises(ModelError, match=rf"{corpus}:1201: turn 2: its text .* is missing .*on_bad_rows=skip"):
        sftx(["data", "check", str(corpus), "template_name=qwen3"])
    found = checked(capsys, corpus, "template_name=qwen3", "data.on_bad_rows=skip", "eval_ratio=0")
    (line,) = found["untrainable"]
    assert line.startswith(f"{corpus}:1201: turn 2: its text")
    assert found["rows"] == 1200


def test_check_reports_and_then_refuses_what_only_a_run_would_refuse(corpus: Path, tmp_path: Path, capsys) -> None:
    one = write(tmp_path / "one.jsonl", ROWS[:1])
    with pytest.raises(DataError, match="too few rows"):
        sftx(["data", "check", str(one)])
    assert "1 records -> 1 rows" in capsys.readouterr().out
    with pytest.raises(DataError, match="no record has the category `cod`"):
        sftx(["data", "check", str(corpus), "data.category_weights={cod: 2}", "--json"])
    assert "`cod`" in json.loads(capsys.readouterr().out)["refused"]
    with pytest.raises(DataError, match="is trained on too"):
        sftx(["data", "check", str(corpus), "--eval", str(corpus)])


def test_check_counts_an_epoch_as_a_run_would(corpus: Path, capsys) -> None:
    epoch = checked(capsys, corpus, "data.category_weights={more:3}")["epoch"]
    assert epoch["held_out_rows"] == 1
    assert epoch["rows"] > len(ROWS)


def test_check_names_the_file_that_was_meant(corpus: Path) -> None:
    with pytest.raises(DataError, match=rf"^{corpus.parent}/corpsu\.jsonl: no such file.*`{corpus}`"):
        sftx(["data", "check", str(corpus.parent / "corpsu.jsonl")])


def test_a_preview_is_what_is_trained_on_and_cannot_steer_the_terminal(tmp_path: Path, capsys) -> None:
    question, answer = "q\tx\x1b[31m\u200b\uff1f ", "\u597d\uff0c  \nb"
    file = write(tmp_path / "odd.jsonl", [("a", question, answer), *ROWS[6:9]])
    assert sftx(["data", "check", str(file), "--show", "4"]) == 0
    shown = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())
    assert "q<U+0009>x<U+001B>[31m<U+200B>\uff1f\u00b7<|im_end|>\u21b5" in shown
    assert "\u27e6\u597d\uff0c\u00b7\u00b7\u21b5\n  b<|im_end|>\u27e7" in shown


def test_a_preview_of_a_long_row_shows_where_learning_begins(tmp_path: Path, capsys) -> None:
    rows = [("a", f"BEGIN {i} " + "word " * 900, "the answer " * 100 + "END") for i in range(4)]
    file = write(tmp_path / "long.jsonl", rows)
    assert sftx(["data", "check", str(file), "--show", "1", "max_seq_length=8192"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(
        r"user\u21b5 BEGIN .* \.\.\. [\d,]+ tokens \.\.\. .*assistant\u21b5 \u27e6the answer the answer", shown
    )
    assert re.search(r"the answer[^\u27e6]*\u27e7 \.\.\. and [\d,]+ tokens", shown)
    assert "END" not in shown


def test_check_names_columns_and_the_templates_owner(tmp_path: Path, capsys) -> None:
    file = tmp_path / "a.jsonl"
    rows = [{"Question": f"q{i}", "answer": "a", "context": "c", "weight": i} for i in range(1, 9)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert sftx(["data", "check", str(file), "--show", "0"]) == 0
    shown = capsys.readouterr().out
    assert "columns: Question as question, answer, weight; unused: `context`; weights of rows: 1 to 8\n" in shown
    assert "template: the model's own)" in shown
    found = checked(capsys, file)
    assert (found["files"][0]["columns"]["unused"], found["template"]) == (["context"], "the model's own")


def test_convert_keeps_what_is_not_to_be_learned(tmp_path: Path, capsys) -> None:
    user, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    rows: list[dict] = [
        {"messages": [user, answer | {"loss": False}, user, answer | {"thinking": "X"}]},
        {"messages": [user, answer], "train": False, "label": True},
        {"prompt": [user, answer, user], "completion": [answer]},
    ]
    files = [tmp_path / f"{i}.jsonl" for i in range(3)]
    for file, row in zip(files, rows, strict=True):
        file.write_text(json.dumps(row) + "\n", encoding="utf-8")
    out = tmp_path / "out.jsonl"
    assert sftx(["data", "convert", *map(str, files), str(out)]) == 0
    assert checked(capsys_cleared(capsys), out, "eval_ratio=0")["untrainable"] == [
        f"{out}:2: none of its turns is supervised: each has weight 0"
    ]
    made = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [[m.get("weight") for m in row["messages"]] for row in made] == [
        [None, 0.0, None, None], [None, None], [None, 0.0, None, None],
    ]  # fmt: skip
    assert [row.get("weight") for row in made] == [None, 0.0, None]
    assert made[0]["messages"][3]["reasoning_content"] == "X"
    with pytest.raises(DataError, match="the column `label` would be taken for something else"):
        sftx(["data", "convert", str(files[1]), str(out), "data.columns={label:null}"])


def test_convert_writes_what_can_be_read_again(corpus: Path, tmp_path: Path, capsys) -> None:
    alpaca = tmp_path / "alpaca.json"
    alpaca.write_text(json.dumps([{"instruction": "add", "input": "1+1", "output": "2"}]), encoding="utf-8")
    out = tmp_path / "out.jsonl"
    assert sftx(["data", "convert", str(corpus), str(alpaca), str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [(r["category"], r["human"], r["assistant"]) for r in rows[:12]] == ROWS
    assert rows[12]["assistant"] == "2"
    assert checked(capsys_cleared(capsys), out)["records"] == 13
    with pytest.raises(DataError, match=r"expected FILES OUT\.jsonl"):
        sftx(["data", "convert", str(corpus)])


def capsys_cleared(capsys: pytest.CaptureFixture[str]) -> pytest.CaptureFixture[str]:
    capsys.readouterr()
    return capsys


def trained_on(make_config, captured, folder: Path, *words: str) -> Counter[str]:
    """Return how often each line of the corpus is in an epoch."""
    config = make_config(
        f"train_file_path={folder}", "train_file_name=corpus.jsonl", "eval_ratio=0", "max_steps=1", "max_train_rows=null",
        "max_seq_length=512", *words, output=f"run{abs(hash(words))}",
    )  # fmt: skip
    run([config])
    captured.output = Path(config.output_dir)
    return Counter(r.origin.rpartition(":")[2] for r in captured.session.rows)


def test_a_run_obeys_the_policies_and_lists_what_it_leaves_out(make_config, captured, corpus: Path) -> None:
    folder = corpus.parent
    assert set(trained_on(make_config, captured, folder).values()) == {1}
    seen = trained_on(make_config, captured, folder, "data.duplicates=drop_exact", "data.conflicts=keep_first")
    assert sorted(seen) == sorted(str(i) for i in (1, *range(4, 13)))
    listed = (captured.output / "skipped_rows.txt").read_text()
    assert listed == f"{corpus}:2: is {corpus}:1 again\n{corpus}:3: answers otherwise than {corpus}:1\n"


def test_a_run_sees_records_as_often_as_their_weights_say(make_config, captured, corpus: Path) -> None:
    seen = trained_on(make_config, captured, corpus.parent, "data.category_weights={chat:3,code:0}")
    assert seen == Counter({"4": 3, "5": 3, **{str(i): 1 for i in range(6, 13)}})
    rows = captured.session.rows
    assert len(rows.lengths) == len(rows) == 13
    assert [len(rows[i].ids_T) for i in range(13)] == rows.lengths.tolist()


def test_system_and_prefix_are_in_what_is_trained_on(make_config, captured, corpus: Path) -> None:
    trained_on(make_config, captured, corpus.parent, "data.system=Be brief.", "data.category_prefix={chat:'[chat] '}")
    decode = captured.session.template.tokenizer.decode
    texts = {r.origin.rpartition(":")[2]: decode(r.ids_T) for r in captured.session.rows}
    assert all("<|im_start|>system\nBe brief.<|im_end|>" in t for t in texts.values())
    assert "[chat] name a colour" in texts["5"]
    assert "[chat]" not in texts["1"]


@pytest.mark.parametrize(
    ("text", "language"),
    [("hello", "latin"), ("\u4f60\u597d", "zh"), ("\u3053\u3093\u306b\u3061\u306f", "ja"), ("123", "none")],
)
def test_languages_are_told_by_script(text: str, language: str) -> None:
    assert language_of(text) == language
