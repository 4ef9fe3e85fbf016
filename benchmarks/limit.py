"""How near a step comes to what this machine's matrix products allow.

    python benchmarks/limit.py [--model small] [--mode lora|qlora|full] [--rows 64] [--threads 1] [KEY=VALUE ...]

The work is counted as for MFU (src/sftx/training/flops.py). Each product's operations at the best rate that its own
shape reaches here, before or after training, make the limit; sftx trains on the rows in between, in the same minutes.
Prints one JSON line: tokens a second are real tokens a second of CPU time, the first step left out; `share` is sftx's
part of the limit.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from work import MODELS, model_folder, rows_file

Shape = tuple[int, int, int]
"""Rows, inner and columns of a product."""
BATCH = 8
SETTINGS = [
    "lora_rank=16", "lora_alpha=32", "lora_dropout=0", "precision=fp32", "optim=adamw", "gradient_checkpointing=false",
    f"per_device_train_batch_size={BATCH}", "gradient_accumulation_steps=1", "eval_ratio=0", "save_strategy=no",
    "tracker=none", "logging_steps=1000", "warmup_steps=0", "disable_tqdm=true", "max_grad_norm=1.0",
]  # fmt: skip
SECONDS = 0.2
"""Spent on the rate of one shape, twice."""
DOCUMENT = 256
"""Of this length is the document at whose products' rate attention is counted."""


@dataclass
class Step:
    """What an optimizer step was made of, and the process's CPU seconds at its end."""

    lengths: list[int]
    supervised: int
    ended: float


@dataclass
class Watched:
    """A run of sftx in this process."""

    work: Any = None
    steps: list[Step] = field(default_factory=list)

    def run(self, words: list[str]) -> None:
        """Train, and note each step."""
        from sftx import run
        from sftx.config.checks.check import freeze
        from sftx.config.composition.prepare import compose_checked
        from sftx.training import loop
        from sftx.training.measure.flops import work_of

        launch = loop._launch

        def noted(session: Any, trial: Any, step: Any) -> Any:
            self.work = self.work or work_of(session.model)
            launched = launch(session, trial, step)
            lengths = [length for batch in step.batches for length in batch.lengths]
            self.steps.append(Step(lengths, step.supervised_tokens, time.process_time()))
            return launched

        loop._launch = noted
        run.run([freeze(compose_checked(words))])


def main() -> None:
    """Measure and print."""
    asked = _arguments()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(asked.threads)
    folder, rows = model_folder(asked.model), rows_file(asked.rows)
    watched = Watched()
    with tempfile.TemporaryDirectory() as out:
        data = [f"train_file_path={rows.parent}", f"train_file_name={rows.name}", f"output_dir={out}/run"]
        typed = {word.split("=", 1)[0] for word in asked.words}
        usual = [word for word in SETTINGS if word.split("=", 1)[0] not in typed]
        watched.run([f"mode={asked.mode}", f"model_name_or_path={folder}", *data, *usual, *asked.words])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    first, *steps = watched.steps
    lengths = [length for step in steps for length in step.lengths]
    supervised, tokens = sum(step.supervised for step in steps), sum(lengths)
    products = _products(watched.work, tokens // len(steps), supervised // len(steps))
    config = json.loads((folder / "config.json").read_text())
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    of_attention = (DOCUMENT, width, DOCUMENT)
    rates = _rates([*products, of_attention])
    flops = watched.work.flops(lengths, supervised)
    of_products = {shape: 2 * math.prod(shape) * count * len(steps) for shape, count in products.items()}
    attention = watched.work.flops(lengths, 0) - watched.work.flops([1] * tokens, 0)
    seconds = sum(n / rates[shape] for shape, n in of_products.items()) + attention / rates[of_attention]
    limit, reached = tokens / seconds, tokens / (steps[-1].ended - first.ended)
    facts = {
        "benchmark": "limit", "model": asked.model, "mode": asked.mode, "threads": asked.threads, "words": asked.words,
        "tokens": tokens, "supervised_tokens": supervised, "mflop_per_token": round(flops / tokens / 1e6, 1),
        "gflop_per_second": {"x".join(map(str, shape)): round(rate / 1e9, 1) for shape, rate in rates.items()},
    }  # fmt: skip
    facts["peak_memory_mb"] = round(peak)
    result = {"limit_tokens_per_second": round(limit, 1), "tokens_per_second": round(reached, 1)}
    print(json.dumps({**facts, **result, "share": round(reached / limit, 3)}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--mode", choices=["lora", "qlora", "full"], default="lora")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE")
    return parser.parse_args()


def _products(work: Any, rows: int, supervised: int) -> Counter[Shape]:
    """Return the shapes of a step's products, and how often each is made."""
    products: Counter[Shape] = Counter()
    for layer, of_layer in [*((layer, rows) for layer in work.layers), (work.head, supervised)]:
        products[of_layer, layer.inner, layer.outer] += 1
        products[of_layer, layer.outer, layer.inner] += 1
        if layer.passes == 3:
            products[layer.outer, of_layer, layer.inner] += 1
    return products


def _rates(shapes: list[Shape]) -> dict[Shape, float]:
    """Return the best rate of each shape in two rounds over all, operations a second of CPU time."""
    rates = dict.fromkeys(shapes, 0.0)
    for _ in range(2):
        for shape in shapes:
            rates[shape] = max(rates[shape], _rate(shape))
    return rates


def _rate(shape: Shape) -> float:
    import torch

    rows, inner, columns = shape
    left, right = torch.randn(rows, inner), torch.randn(inner, columns)
    out = torch.empty(rows, columns)
    best = _seconds(lambda: torch.mm(left, right, out=out))
    return 2 * math.prod(shape) / best


def _seconds(make: Callable[[], object]) -> float:
    make()
    best, start = math.inf, time.process_time()
    while time.process_time() - start < SECONDS:
        before = time.process_time()
        make()
        best = min(best, time.process_time() - before)
    return best


if __name__ == "__main__":
    main()
