"""What checkpoints cost: training with `save_steps=auto` at its most frequent against training without any.

    python benchmarks/saving.py [--steps 150] [--pairs 3] [KEY=VALUE ...]

Prints one JSON line: the share of the time of training (loading and the end left out) that saving adds, wall and CPU,
as the median over pairs of runs that alternate, and how many checkpoints were made. Goal: at most 0.035.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUN = """
import json, resource, sys, time
import sftx.run
from sftx.config.checks.check import freeze
from sftx.config.composition.prepare import compose_checked
train = sftx.run.train
def cpu():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
def timed(session, trials, ended):
    wall, used = time.perf_counter(), cpu()
    train(session, trials, ended)
    trial = trials[0]
    found = {"wall": time.perf_counter() - wall, "cpu": cpu() - used, "save_seconds": trial.save_interval.save_seconds}
    print("FOUND", json.dumps(found))
sftx.run.train = timed
sftx.run.run([freeze(compose_checked(sys.argv[1:]))])
"""
SHARED = [
    "mode=lora", "eval_ratio=0", "tracker=none", "logging_steps=1000000", "gradient_accumulation_steps=4",
    "per_device_train_batch_size=2", "save_total_limit=null", "lost_work_minutes=1e-9", "disable_tqdm=true",
]  # fmt: skip


def measured(words: list[str]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", RUN, *SHARED, *words, f"output_dir={folder}/run"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        (line,) = [text for text in done.stdout.splitlines() if text.startswith("FOUND")]
        saved = len(list(Path(folder, "run", "checkpoints").glob("step-*")))
        return json.loads(line.removeprefix("FOUND")) | {"checkpoints": saved}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE")
    asked = parser.parse_args()
    words = [f"max_steps={asked.steps}", *asked.words]
    overheads: dict[str, list[float]] = {"wall": [], "cpu": []}
    for number in range(asked.pairs):
        pair = [["save_steps=auto", "save_strategy=steps"], ["save_strategy=no"]]
        order = pair if number % 2 else pair[::-1]
        found = {choice[-1]: measured(words + choice) for choice in order}
        saving, plain = found["save_strategy=steps"], found["save_strategy=no"]
        for kind, values in overheads.items():
            values.append(saving[kind] / plain[kind] - 1)
    result = {f"overhead_{kind}": round(statistics.median(values), 4) for kind, values in overheads.items()}
    all_pairs = {f"{kind}_of_pairs": [round(v, 4) for v in values] for kind, values in overheads.items()}
    counts = {"checkpoints": saving["checkpoints"], "save_seconds": saving["save_seconds"]}
    print(
        json.dumps({"benchmark": "saving", "steps": asked.steps, **result, **all_pairs, **counts, "words": asked.words})
    )


if __name__ == "__main__":
    main()
