"""The work of the speed benchmarks: models of three sizes and rows of real Python code, made once and kept.

The rows are definitions of Python's standard library, each cut in a question and an answer. Their lengths are drawn
from a log-normal distribution (median 120 tokens, sigma 0.9, 28 to 1,024), as those of instruction data are skewed.
The small and tiny models have random weights and a tokenizer trained on the same sources: `load` for a peer is that
of any Qwen2 checkpoint. `smollm2` is a real model (`make smollm2`).
"""

from __future__ import annotations

import ast
import bisect
import csv
import json
import math
import random
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / ".cache" / "benchmarks"
VERSION = 2
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
        "intermediate_size": 384, "vocab_size": 8192,
    },
    "small": {
        "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2,
        "intermediate_size": 1408, "vocab_size": 32000,
    },
}  # fmt: skip
MODELS = (*SHAPES, "smollm2")
LENGTH, SPREAD, SHORTEST, LONGEST = 120, 0.9, 28, 1024
"""Of a row, in tokens of the small model."""
KINDS = ("explain", "write", "summarize", "complete")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TURN = 14
"""Tokens that the chat template adds to a row."""


@dataclass(frozen=True)
class Definition:
    """A function or class of the standard library."""

    module: str
    name: str
    source: str


def model_folder(name: str) -> Path:
    """Return the folder of a model, made when it is not there yet."""
    if name == "smollm2":
        folder = ROOT / "models" / "smollm2-135m"
        if not folder.is_dir():
            raise SystemExit("smollm2 is not here: make smollm2")
        return folder
    folder = WORK / f"{name}-{VERSION}"
    if not (folder / "model.safetensors").is_file():
        _make_model(folder, SHAPES[name])
    return folder


def rows_file(count: int, *, seed: int = 7) -> Path:
    """Return a CSV of `count` rows, made when it is not there yet; a longer one begins with the same rows."""
    file = WORK / f"rows-{count}-{VERSION}-{sys.version_info[0]}.{sys.version_info[1]}.csv"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_suffix(".new")
        with beside.open("w", encoding="utf-8", newline="") as out:
            table = csv.writer(out)
            table.writerow(["category", "human", "assistant"])
            table.writerows(row for row, _ in zip(_rows(seed), range(count), strict=False))
        beside.rename(file)
    return file


def rows_of(file: Path) -> list[tuple[str, str, str]]:
    """Return a CSV's rows."""
    with file.open(encoding="utf-8", newline="") as lines:
        return [(row["category"], row["human"], row["assistant"]) for row in csv.DictReader(lines)]


def _make_model(folder: Path, shape: dict[str, int]) -> None:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from sftx.model.loading.builtin import tokenizer_from

    backend = _tokenizer(shape["vocab_size"])
    tokenizer = tokenizer_from(backend)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    config = Qwen2Config(
        **shape, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, dtype="float32",
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)


def _tokenizer(vocabulary: int) -> Any:
    """Train a byte-level BPE on the standard library, split as Qwen2 splits."""
    from tokenizers import trainers

    from sftx.model.loading.builtin import backend_of

    tokenizer = backend_of({}, [])
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(set(_alphabet())),
        show_progress=False,
    )
    tokenizer.train_from_iterator((path.read_text(encoding="utf-8") for path in _sources()), trainer)
    return tokenizer


def _alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return list(ByteLevel.alphabet())


def _sources() -> Iterator[Path]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(folder.rglob("*.py")):
        if not {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"} & set(path.parts):
            try:
                ast.parse(path.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError):
                continue
            yield path


def _definitions() -> list[Definition]:
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in _sources():
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines(keepends=True)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                source = "".join(lines[node.lineno - 1 : node.end_lineno])
                found.append(Definition(str(path.relative_to(stdlib)), node.name, source))
    return found


def _rows(seed: int) -> Iterator[tuple[str, str, str]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_folder("small") / "tokenizer.json"))
    definitions = _definitions()
    encoded = tokenizer.encode_batch_fast([d.source for d in definitions], add_special_tokens=False)
    by_length = sorted(((e.ids, d) for e, d in zip(encoded, definitions, strict=True)), key=lambda one: len(one[0]))
    lengths = [len(ids) for ids, _ in by_length]
    draw = random.Random(seed)
    while True:
        tokens = int(min(LONGEST, max(SHORTEST, draw.lognormvariate(math.log(LENGTH), SPREAD)))) - TURN
        kind = draw.choice(KINDS)
        asked = max(6, int(tokens * draw.uniform(0.15, 0.7)))
        answered = max(6, tokens - asked)
        first = min(bisect.bisect_left(lengths, asked + answered), len(lengths) - 40)  # one that is long enough
        ids, definition = by_length[draw.randrange(first, len(lengths))]
        head = f"{kind} `{definition.name}` of {definition.module}:\n"
        cut = max(2, asked - len(tokenizer.encode(head, add_special_tokens=False).ids))
        # A line break at an answer's start may be one token with that of the turn's head, or not: trainers differ.
        answer = tokenizer.decode(ids[cut : cut + answered]).strip() or "pass"
        yield kind, head + tokenizer.decode(ids[:cut]), answer


def main() -> None:
    """Make all models and print what the rows are like."""
    from tokenizers import Tokenizer

    for name in SHAPES:
        folder = model_folder(name)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        lengths = sorted(len(tokenizer.encode(h + a).ids) + TURN for _, h, a in rows_of(rows_file(2000)))
        facts = {"median": lengths[1000], "mean": sum(lengths) // 2000, "95 %": lengths[1900], "longest": lengths[-1]}
        print(json.dumps({"model": name, "folder": str(folder), "tokens of a row": facts}))


if __name__ == "__main__":
    main()
