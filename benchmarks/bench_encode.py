"""How fast records become tokens: `python benchmarks/bench_encode.py [MODEL] [RECORDS]`.

Prints rows and tokens per CPU-second of `encode_batch`, and what tokenising the same text alone takes.
"""

from __future__ import annotations

import random
import resource
import sys
import time

from transformers import AutoTokenizer

from sftx import PROJECT_ROOT
from sftx.data.policy import EncodePolicy
from sftx.data.record import Record, pair
from sftx.data.template import ChatTemplate
from sftx.model.load import find_model


def records(count: int) -> list[Record]:
    """Make records of about 160 tokens: words of the embedded corpus in another order each."""
    with (PROJECT_ROOT / "data" / "aspcoder_train.csv").open(encoding="utf-8") as file:
        words = [w for w in file.read().split() if w.isascii()]
    rng = random.Random(0)

    def text(length: int) -> str:
        start = rng.randrange(len(words) - 8 * length)
        return " ".join(words[start : start + 8 * length : rng.randint(1, 8)][:length])

    return [pair("c", text(15), text(45), "a.csv", i, {}) for i in range(count)]


def cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "qwen-tiny"
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 100_000
    source = find_model(name)
    tokenizer = AutoTokenizer.from_pretrained(source.folder)
    template = ChatTemplate(tokenizer, tokenizer.chat_template, ["<|im_end|>", "<|endoftext|>"])
    made = records(count)
    start, clock = cpu(), time.perf_counter()
    rows = [row for found in template.encode_batch(made, EncodePolicy(2048)) for row in found]
    used, wall = cpu() - start, time.perf_counter() - clock
    tokens = sum(len(r.ids_T) for r in rows)
    start = cpu()
    texts = [r.human + r.assistant for r in made]
    for i in range(0, count, 4096):
        tokenizer.backend_tokenizer.encode_batch_fast(texts[i : i + 4096], add_special_tokens=False)
    alone = cpu() - start
    print(
        f"{name}: {len(rows)} rows, {tokens / 1e6:.1f} M tokens: {used:.1f} CPU-s ({wall:.1f} s on the clock), "
        f"{len(rows) / used:.0f} rows/s, {tokens / used / 1e6:.2f} M tokens/s; tokenising alone {alone:.1f} CPU-s"
    )


if __name__ == "__main__":
    main()
