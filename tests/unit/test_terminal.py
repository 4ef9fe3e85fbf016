"""Control characters of the user's files never reach the terminal, and messages stay short."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from sftx.cli import main as sftx_main
from sftx.data.files.problems import MAX_TEXT
from sftx.data.records.read import read_file
from sftx.errors import ConfigError, DataError, printed
from sftx.logs import RunLog, ThirdPartyLog
from sftx.terminal import visible, visible_lines

EVIL = "\x1b[2J\x1b]0;x\x07\u202e\x9b31m"
OBEYED = {"\x1b", "\x07", "\u202e", "\x9b", "\r", "\b"}


def test_visible() -> None:
    assert visible("中文 a\nb") == "中文 a\\nb"
    assert visible_lines("a\n\tb\r\x1b") == "a\n\tb<U+000D><U+001B>"
    assert visible("\ud83d") == "<U+D83D>"
    assert visible("👨\u200d👩") == "👨\u200d👩"


@pytest.mark.parametrize("error", [DataError(EVIL), ConfigError([EVIL, "b"]), ValueError(EVIL)])
def test_no_error_steers_the_terminal(error: Exception) -> None:
    assert not OBEYED & set(printed(error))
    assert "<U+001B>[2J" in printed(error)


def test_no_log_line_steers_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(ThirdPartyLog(), is_main=True)
    try:
        log.to_file(tmp_path / "train.log", "0")
        logging.getLogger("sftx").info("category %s: 1\nnext line", EVIL)
    finally:
        log.close()
    out = "".join(capsys.readouterr())
    for text in (out, (tmp_path / "train.log").read_text(encoding="utf-8")):
        assert not OBEYED & set(text)
        assert "<U+001B>[2J" in text
        assert "1\nnext line" in text


@pytest.mark.parametrize(
    "text",
    [
        f"category,{EVIL}human,assistant\na,b,c\n",
        f"category,human,assistant\n{EVIL},b,c\nb,c,d\n",
        f"category,human,assistant\na,b,c\n{EVIL},b,\n",
        f"category,human,assistant\n{EVIL},{EVIL}q,{EVIL}a\nb,c,d\n",
    ],
)
@pytest.mark.parametrize("more", [[], ["data.on_bad_rows=skip"], ["--json"]])
def test_no_report_steers_the_terminal(
    tmp_path: Path, text: str, more: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"{'a' if more else EVIL.replace('/', '')}.csv"
    path.write_text(text, encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["sftx", "data", "check", str(path), "eval_ratio=0", *more])
    with pytest.raises(SystemExit):
        sftx_main()
    assert not OBEYED & set("".join(capsys.readouterr()))


def test_messages_are_short_however_many_columns_a_file_has(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    names = [f"column_{i}" for i in range(5000)]
    path.write_text(",".join(names) + "\n" + ",".join(names) + "\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_file(path)
    for line in str(caught.value).split("\n"):
        assert len(line) < len(str(path)) + MAX_TEXT + 60
        assert "no column" in line
        assert "data.columns=" in line
