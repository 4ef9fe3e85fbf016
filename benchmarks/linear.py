"""Does cost grow as the work does? More rows, and longer ones.

    python benchmarks/linear.py [--model tiny] [--rows 256] [--lengths 256,1024,4096] [--factors 1,2,4,8]

Prints a JSON line a case, tokens a second of CPU time (the first step left out), then one that sums up: the largest
change against the first case, over the numbers of rows, and over the lengths once attention's own time, which grows
with the length, is taken out: that of its forward and backward pass by itself, on rows as long, right after. Goal: 0.1.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from limit import SETTINGS, Watched
from work import MODELS, model_folder, rows_file, rows_of

TOKENS_OF_A_STEP = 4096
LONG_STEPS = 5


def main() -> None:
    """Measure and print."""
    asked = _arguments()
    if asked.child:
        print(json.dumps(_measured(json.loads(asked.child))))
        return
    folder = model_folder(asked.model)
    with tempfile.TemporaryDirectory() as scratch:
        by_rows = [_case(asked, folder, rows_file(asked.rows * n), 8, rows=asked.rows * n) for n in asked.factors]
        files = {length: _rows_of_length(folder, Path(scratch), length) for length in asked.lengths}
        by_length = [
            _case(asked, folder, file, max(1, TOKENS_OF_A_STEP // length), length=length)
            for length, file in files.items()
        ]
    change = {
        "of_rows": _change([case["tokens_per_second"] for case in by_rows]),
        "of_lengths": _change([case["tokens_per_second"] for case in by_length]),
        "of_lengths_without_attention": _change(
            [case["tokens_per_second"] / (1 - case["attention"]) for case in by_length]
        ),
    }
    print(json.dumps({"benchmark": "linear", "model": asked.model, "threads": 1, "largest_change": change}))


def _arguments() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(n) for n in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--factors", type=numbers, default=[1, 2, 4, 8])
    parser.add_argument("--lengths", type=numbers, default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def _rows_of_length(folder: Path, scratch: Path, length: int) -> Path:
    """Write rows of more than `length` tokens, which training cuts to it; a quarter of each is the question."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode("".join(h + a for _, h, a in rows_of(rows_file(512))), add_special_tokens=False).ids
    file = scratch / f"rows-{length}.csv"
    with file.open("w", encoding="utf-8", newline="") as out:
        table = csv.writer(out)
        table.writerow(["category", "human", "assistant"])
        for number in range(LONG_STEPS * max(1, TOKENS_OF_A_STEP // length)):
            at = 37 * number
            cut = at + length // 4
            table.writerow(["code", tokenizer.decode(ids[at:cut]), tokenizer.decode(ids[cut : cut + 2 * length])])
    return file


def _case(asked: argparse.Namespace, folder: Path, file: Path, batch: int, **what: int) -> dict[str, Any]:
    """Train in a process of its own; print and return the figures."""
    length = what.get("length", 1024)
    usual = [w for w in SETTINGS if not w.startswith("per_device")]
    words = [
        *usual, f"per_device_train_batch_size={batch}", f"model_name_or_path={folder}", f"max_seq_length={length}",
        f"train_file_path={file.parent}", f"train_file_name={file.name}", "mode=lora",
    ]  # fmt: skip
    command = [sys.executable, __file__, "--child", json.dumps(words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    found = what | json.loads(done.stdout.splitlines()[-1])
    print(json.dumps({"benchmark": "linear", "model": asked.model, **found}), flush=True)
    return found


def _measured(words: list[str]) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    watched = Watched()
    with tempfile.TemporaryDirectory() as out:
        watched.run([*words, f"output_dir={out}/run"])
    first, *steps = watched.steps
    tokens = sum(sum(step.lengths) for step in steps)
    seconds = steps[-1].ended - first.ended
    attention = sum(_attention_seconds(_config(words), step.lengths) for step in steps)
    return {
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1),
        "attention": round(attention / seconds, 4),
    }


def _config(words: list[str]) -> dict[str, int]:
    folder = next(word.removeprefix("model_name_or_path=") for word in words if word.startswith("model_name_or_path="))
    found: dict[str, int] = json.loads((Path(folder) / "config.json").read_text())
    return found


def _attention_seconds(config: dict[str, int], lengths: list[int]) -> float:
    """Return how long all blocks' attention takes by itself, forward and backward."""
    import torch
    from transformers import AttentionInterface

    from sftx.model.attention import register

    heads, keys = config["num_attention_heads"], config["num_key_value_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    attend = AttentionInterface()[register("sdpa")]
    inputs = [torch.randn(1, sum(lengths), n, width).transpose(1, 2).requires_grad_() for n in (heads, keys, keys)]

    def once() -> float:
        start = time.process_time()
        out, _ = attend(None, *inputs, None, document_lengths=lengths)
        torch.autograd.grad(out, inputs, torch.ones_like(out))
        return time.process_time() - start

    once()
    return config["num_hidden_layers"] * min(once() for _ in range(3))


def _change(rates: list[float]) -> float:
    return round(max(abs(rate / rates[0] - 1) for rate in rates), 3)


if __name__ == "__main__":
    main()
