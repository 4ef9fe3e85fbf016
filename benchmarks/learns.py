"""Does sftx teach a real model? SmolLM2-135M learns a real file; one JSON line says what changed.

    SFTX_SHARED=<folder with data/> python benchmarks/learns.py [--mode qlora] [--file F] [--steps N] [key=value ...]

Runs `train.py` as a user would, takes the held-out loss before and after from the run folder, and asks
the base and the base with `final/` the same question through plain transformers and PEFT, greedily.
The exit code is 1 when nothing was learned.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sftx import PROJECT_ROOT
from sftx.errors import ModelError, SftxError, reported
from sftx.training.saving.metrics import read_metrics

QUESTION = {"identity.csv": "Who are you?"}
"""What is asked after training on a file; otherwise its first row's `human`."""
SETTINGS = {
    "eval_ratio": 0.15,
    "max_seq_length": 256,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": "false",
    "learning_rate": 5e-4,
    "lora_rank": 16,
    "lora_alpha": 32,
    "warmup_steps": 0.05,
    "logging_steps": 5,
    "eval_steps": 11,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": "true",
}
LEARNED = 0.7
"""The held-out loss must fall below this share of what it was."""


def main() -> int:
    """Train, ask, print."""
    asked = _arguments()
    shared = os.environ.get("SFTX_SHARED")
    if not shared:
        raise SftxError("SFTX_SHARED is not set: name the folder that holds data/identity.csv.")
    file = Path(shared) / "data" / asked.file
    if not file.is_file():
        raise SftxError(f"{file}: there is no such file.")
    if not asked.model.is_dir():
        raise ModelError(f"{asked.model}: there is no such model. `make smollm2` fetches it.")
    with tempfile.TemporaryDirectory(prefix="sftx-learns-") as scratch:
        report = _measure(asked, file, Path(scratch) / "run")
    text = json.dumps(report, ensure_ascii=False)
    print(text.replace(shared.rstrip("/"), "$SFTX_SHARED"))
    return 0 if report["learned"] else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--file", default="identity.csv", help="a file in $SFTX_SHARED/data")
    parser.add_argument("--mode", default="lora", choices=["lora", "qlora"])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--steps", type=int, help="stop after so many steps")
    parser.add_argument("--rows", type=int, default=48, help="use only the file's first rows")
    parser.add_argument("--question", help="what to ask before and after; default: a question of the file")
    parser.add_argument("--model", type=Path, default=PROJECT_ROOT / "models" / "smollm2-135m")
    parser.add_argument("overrides", nargs="*", help="more for train.py, for example learning_rate=2e-4")
    return parser.parse_args()


def _measure(asked: argparse.Namespace, file: Path, run: Path) -> dict[str, Any]:
    settings = SETTINGS | {"num_train_epochs": asked.epochs, "max_train_rows": asked.rows}
    settings |= {"max_steps": asked.steps} if asked.steps else {}
    settings |= dict(word.partition("=")[::2] for word in asked.overrides)
    words = ["model=smollm2", f"mode={asked.mode}", f"train_file_path={file.parent}", f"train_file_name={file.name}"]
    words += [f"{k}={v}" for k, v in settings.items()]
    placed = [f"model_name_or_path={asked.model.resolve()}", f"output_dir={run}"]
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "train.py", *words, *placed],
        cwd=PROJECT_ROOT,
        stdout=sys.stderr,  # stdout is for the one line
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SftxError(f"train.py ended with exit code {done.returncode}; what it said is above.")
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    result = manifest["result"]
    question = asked.question or QUESTION.get(file.name) or _first_question(file)
    before, after = _answers(asked.model, run / "final", question, asked.mode)
    return {
        "benchmark": "learns",
        "command": shlex.join(["python", "train.py", *words]),
        "model": asked.model.name,
        "mode": asked.mode,
        "file": file.name,
        "rows": manifest["rows"],
        "steps": result["steps"],
        "seconds": round(seconds, 1),
        "threads": manifest["environment"]["hardware"]["torch_threads"],
        "eval_loss_before": round(result["eval_loss_before"], 4),
        "eval_loss_after": round(result["eval_loss"], 4),
        "eval_loss_by_step": {
            int(r["step"]): round(r["eval/loss"], 4) for r in read_metrics(run / "metrics.jsonl") if "eval/loss" in r
        },
        "learned": result["eval_loss"] < LEARNED * result["eval_loss_before"] and before != after,
        "question": question,
        "answer_before": before,
        "answer_after": after,
    }


def _first_question(file: Path) -> str:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        return next(csv.DictReader(lines))["human"]


def _answers(base: Path, final: Path, question: str, mode: str) -> tuple[str, str]:
    """Return the greedy answer of the base, and of the base with the adapter, in the numbers it was trained on."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    options: dict[str, Any] = {"dtype": torch.float32}
    if mode == "qlora":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    tokenizer = AutoTokenizer.from_pretrained(final)
    model = AutoModelForCausalLM.from_pretrained(base, **options)
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)

    def answer(asked: Any) -> str:
        with torch.no_grad():
            ids = asked.generate(**prompt.to(model.device), max_new_tokens=80, do_sample=False)[0]
        return tokenizer.decode(ids[prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    before = answer(model)
    return before, answer(PeftModel.from_pretrained(model, final).eval())


if __name__ == "__main__":
    with reported():
        sys.exit(main())
