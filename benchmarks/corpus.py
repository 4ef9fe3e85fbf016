"""The corpus of `tokenise.py`: as many rows as are asked for, that repeat each other no more than real text does.

Every other clause is the beginning of one real clause and the end of another, cut at any letter, and all digits
are drawn anew: so words and runs of Chinese keep appearing that were not seen before, and a cache of words helps
no more than it would with real text. Of all words some 0.13 are different ones; of as many words of Python's own
sources 0.15 are, and of prose fewer.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import os
import random
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

SHARED = ("alpaca_zh_demo.csv", "self_instruct_seed.csv", "identity.csv", "questions_gen_postgres.csv")
OWN = "aspcoder_train.csv"
"""The embedded corpus: code."""
CLAUSE = re.compile(r"[^，。；：！？,.;:!?\n]*[，。；：！？,.;:!?\n]+\s*|[^，。；：！？,.;:!?\n]+")
DIGIT = re.compile("[0-9]")
RUN = re.compile("[\u4e00-\u9fff]+")
CHINESE = "zh"
LETTERS = {True: (30, 75), False: (64, 184)}
"""Median letters of a question and an answer, Chinese and not: together some 160 tokens of qwen-tiny."""
SPREAD = 0.7
"""Of the logarithm of the lengths: the longest of 100,000 rows is some twenty times the median."""
FEWEST = 500
"""Of fewer clauses no rows are made: they would be too much alike."""
COUNTED = 100_000
"""Rows whose words are counted."""
CSV = "rows.csv"
FORMS = {"pairs": "pairs.jsonl", "chats": "chats.jsonl", "alpaca": "alpaca.jsonl"}


def make_corpus(asked: argparse.Namespace) -> dict[str, Any]:
    """Write the same rows as sftx's CSV and, with a peer, in the peers' forms; return what is to be known of them."""
    forms = FORMS if asked.against else {}
    mark = asked.folder / "made.json"
    recipe = [Path(__file__).read_text(encoding="utf-8"), asked.rows, asked.megabytes, asked.stretch, sorted(forms)]
    if mark.is_file() and json.loads(mark.read_text())["recipe"] == recipe:
        return json.loads(mark.read_text())["facts"]
    asked.folder.mkdir(parents=True, exist_ok=True)
    words, runs = _Counted(), _Counted()
    with ExitStack() as stack:
        file = stack.enter_context((asked.folder / CSV).open("w", encoding="utf-8", newline=""))
        others = {k: stack.enter_context((asked.folder / n).open("w", encoding="utf-8")) for k, n in forms.items()}
        table = csv.writer(file)
        table.writerow(["category", "human", "assistant"])
        for number, (kind, human, answer) in enumerate(_rows(asked.stretch)):
            if number >= asked.rows if asked.megabytes is None else file.tell() >= asked.megabytes * 1e6:
                break
            table.writerow([kind, human, answer])
            for form, out in others.items():
                out.write(json.dumps(_in_form(form, human, answer), ensure_ascii=False) + "\n")
            if number < COUNTED:
                text = human + " " + answer
                runs.add(RUN.findall(text)) if kind == CHINESE else words.add(text.split())
    (asked.folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": FORMS["alpaca"]}}))
    size = (asked.folder / CSV).stat().st_size
    facts = {"corpus_mb": round(size / 1e6, 1), "distinct_words": words.share(), "distinct_chinese_runs": runs.share()}
    mark.write_text(json.dumps({"recipe": recipe, "facts": facts}))
    return facts


class _Counted:
    """How many words there were, and how many different ones."""

    def __init__(self) -> None:
        self.count, self.seen = 0, set[str]()

    def add(self, words: list[str]) -> None:
        self.count += len(words)
        self.seen.update(words)

    def share(self) -> float:
        return round(len(self.seen) / max(1, self.count), 3)


def _in_form(form: str, human: str, answer: str) -> dict[str, Any]:
    question, reply = {"role": "user", "content": human}, {"role": "assistant", "content": answer}
    return {
        "pairs": {"prompt": [question], "completion": [reply]},
        "chats": {"messages": [question, reply]},
        "alpaca": {"instruction": human, "input": "", "output": answer},
    }[form]


def _rows(stretch: float) -> Iterator[tuple[str, str, str]]:
    draw = random.Random(0)
    clauses = _clauses()
    kinds = [CHINESE, CHINESE, *clauses]  # three of eight rows are Chinese
    for _ in itertools.count():
        kind = draw.choice(kinds)
        human, answer = (_text(draw, clauses[kind], median * stretch) for median in LETTERS[kind == CHINESE])
        yield kind, human, answer


def _clauses() -> dict[str, list[str]]:
    from sftx import PROJECT_ROOT
    from sftx.errors import SftxError

    shared = os.environ.get("SFTX_SHARED")
    if not shared:
        raise SftxError("SFTX_SHARED is not set: name the folder that holds data/alpaca_zh_demo.csv and the others.")
    found: dict[str, list[str]] = {}
    for path in [*(Path(shared) / "data" / name for name in SHARED), PROJECT_ROOT / "data" / OWN]:
        with path.open(encoding="utf-8-sig", newline="") as file:
            texts = [row[column] for row in csv.DictReader(file) for column in ("human", "assistant")]
        for clause in (c for text in texts for c in CLAUSE.findall(text) if c.strip()):
            found.setdefault(CHINESE if RUN.search(clause) else path.stem, []).append(clause)
    return {kind: some for kind, some in found.items() if len(some) >= FEWEST}


def _text(draw: random.Random, clauses: list[str], median: float) -> str:
    wanted = draw.lognormvariate(math.log(median), SPREAD)
    text = ""
    while len(text) < wanted:
        one, other = draw.choice(clauses), draw.choice(clauses)
        whole = draw.random() < 0.5
        text += one if whole else one[: draw.randint(1, len(one))] + other[draw.randrange(len(other)) :]
    text = DIGIT.sub(lambda _: draw.choice("0123456789"), text)
    return text[: max(8, int(wanted))].strip() or "?"
