"""Does cost grow as the work does? More rows, and longer ones.

    python benchmarks/linear.py [--model tiny] [--rows 256] [--lengths 256,1024,4096] [--factors 1,2,4,8]

Runs the cases in turns, `--rounds` times. Prints a JSON line a run, tokens a second of CPU time (the first step left
out), then one that sums up each case's fastest run, as neighbours on a machine only slow it: the largest change against
the first case, over the numbers of rows, and over the lengths once attention's own time, which grows with the length,
is taken out: what its forward and backward passes took in the run. Goal: 0.1.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from limit import SETTINGS, Watched
from work import MODELS, model_folder, rows_file, rows_of

TOKENS_OF_A_STEP = 4096
LONG_STEPS = 8


def main() -> None:
    """Measure and print."""
    asked = _arguments()
    if asked.child:
        print(json.dumps(_measured(json.loads(asked.child))))
        return
    folder = model_folder(asked.model)
    with tempfile.TemporaryDirectory() as scratch:
        files = {length: _rows_of_length(folder, Path(scratch), length) for length in asked.lengths}
        by_rows: list[dict[str, Any]] = []
        by_length: list[dict[str, Any]] = []
        for _ in range(asked.rounds):
            by_rows += [_case(asked, folder, rows_file(asked.rows * n), 8, rows=asked.rows * n) for n in asked.factors]
            by_length += [
                _case(asked, folder, file, max(1, TOKENS_OF_A_STEP // length), length=length)
                for length, file in files.items()
            ]
    change = {
        "of_rows": _change(by_rows, "rows", "tokens_per_second"),
        "of_lengths": _change(by_length, "length", "tokens_per_second"),
        "of_lengths_without_attention": _change(by_length, "length", "without_attention"),
    }
    print(json.dumps({"benchmark": "linear", "model": asked.model, "rounds": asked.rounds, "largest_change": change}))


def _arguments() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(n) for n in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--factors", type=numbers, default=[1, 2, 4, 8])
    parser.add_argument("--lengths", type=numbers, default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--rounds", type=int, default=3)
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
    watched, attention = Watched(), _time_attention()
    with tempfile.TemporaryDirectory() as out:
        watched.run([*words, f"output_dir={out}/run"])
    first, *steps = watched.steps
    tokens = sum(sum(step.lengths) for step in steps)
    seconds = steps[-1].ended - first.ended
    spent = sum(took for ended, took in attention if ended > first.ended)
    return {
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1),
        "attention": round(spent / seconds, 4),
        "without_attention": round(tokens / (seconds - spent), 1),
    }


def _time_attention() -> list[tuple[float, float]]:
    """Return a list that each pass of attention will add to: when it ended and how long it took, in CPU seconds."""
    from sftx.model.kernels.cpu_attention import _Attention

    passes: list[tuple[float, float]] = []

    def timed(function: Callable[..., Any]) -> Any:
        def call(*arguments: Any) -> Any:
            start = time.process_time()
            result = function(*arguments)
            ended = time.process_time()
            passes.append((ended, ended - start))
            return result

        return staticmethod(call)

    kind: Any = _Attention
    kind.forward, kind.backward = timed(kind.forward), timed(kind.backward)
    return passes


def _change(runs: list[dict[str, Any]], case: str, rate: str) -> float:
    """Return the largest change of a rate against the first case, each case's fastest run counting."""
    fastest: dict[int, float] = {}
    for run in runs:
        fastest[run[case]] = max(run[rate], fastest.get(run[case], 0.0))
    rates = list(fastest.values())
    return round(max(abs(rate / rates[0] - 1) for rate in rates), 3)


if __name__ == "__main__":
    main()
