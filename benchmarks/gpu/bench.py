"""sftx on a GPU, beside transformers + PEFT alone and, where it is installed, TRL.

    python benchmarks/gpu/bench.py [--shapes 0.5b,7b] [--modes lora,qlora,full] [--minutes 10] [--length 2048]
    python benchmarks/gpu/bench.py --shapes toy --length 64        # the same on a CPU, in seconds

Models have the shapes of Qwen2.5 and random weights; rows are all as long as `--length`, which leaves packing and
padding out. sftx runs through `train.py` and its own metrics are read. Prints a JSON line a run: tokens a second
(over the steps after the first four, without a stop between them), MFU (operations counted alike for all,
src/sftx/training/flops.py; recomputed ones do not count) and peak memory; then one line with sftx's ratio to each
other. `sftx` has the settings of the others: bf16, torch's AdamW, no dropout, no checkpointing; `defaults` is sftx as
it comes: fp16, paged AdamW, dropout, checkpointing, 16 rows a step, in micro-batches of as many as fit. What did not
fit or was not run is a line that says so. `--set compile=true` and the like go to sftx alone.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SHAPES: dict[str, dict[str, Any]] = {
    "toy": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 8192, "tie_word_embeddings": True,
    },
    "0.5b": {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "7b": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
    },
}  # fmt: skip
BATCH = {"toy": 2, "0.5b": 8, "7b": 2}
"""Rows of a micro-batch, which is a step."""
OWN, DEFAULTS = "sftx", "defaults"
DEFAULT_STEP = 16
"""Rows of a step by default."""
RANK, ALPHA = 16, 32
WARM = 4
"""Steps that are not counted, and those between two records of sftx."""
FULL_BYTES = 16
"""A parameter's in full mode: weight, gradient and AdamW's two moments, fp32."""


def main() -> int:
    """Run what was asked for, as far as the time goes."""
    asked = _arguments()
    if asked.part:
        print(json.dumps(PARTS[asked.part](asked)), flush=True)
        return 0
    end = time.monotonic() + 60 * asked.minutes
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for shape in asked.shapes.split(","):
            asked.folder = Path(scratch) / shape
            made = [sys.executable, __file__, "--part", "model", "--folder", str(asked.folder), "--shapes", shape]
            done = subprocess.run(made, check=True, stdout=subprocess.PIPE, text=True)  # here, it would stay on the GPU
            device = json.loads(done.stdout.splitlines()[-1])
            for mode, peer in ((m, p) for m in asked.modes.split(",") for p in asked.trainers.split(",")):
                case = {"benchmark": "gpu", "shape": shape, "mode": mode, "trainer": peer, "length": asked.length}
                left = end - time.monotonic()
                reason = "the time was over" if left <= 0 else _too_large(asked.folder, mode, device["memory"])
                found = _measured(asked, case, left) if reason is None else {"not_run": reason}
                results.append(case | found)
                print(json.dumps(results[-1]), flush=True)
    print(json.dumps({"benchmark": "gpu", "device": device["name"], "ratios": _ratios(results)}))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="0.5b,7b")
    parser.add_argument("--modes", default="lora,qlora,full")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--checkpointing", default="false", help="gradient_checkpointing of all")
    parser.add_argument("--trainers", default="sftx,defaults,plain,trl")
    parser.add_argument("--set", nargs="*", default=[], help="more settings of sftx")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--mode", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.steps <= WARM:
        parser.error(f"--steps: more than {WARM}, which are not counted")
    return asked


def model_part(asked: argparse.Namespace) -> dict[str, Any]:
    """Save a model of random weights."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from sftx.model.loading.builtin import ensure_builtin

    tokenizer = AutoTokenizer.from_pretrained(ensure_builtin())
    tokenizer.save_pretrained(asked.folder)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = Qwen2Config(**SHAPES[asked.shapes], max_position_embeddings=32768, bos_token_id=None, **ids)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2ForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(asked.folder)
    if not torch.cuda.is_available():
        return {"name": f"CPU, {os.cpu_count()} cores", "memory": None}
    return {"name": torch.cuda.get_device_name(), "memory": torch.cuda.get_device_properties(0).total_memory}


def _make_rows(folder: Path, length: int, count: int) -> Path:
    """Write rows that are longer than `length` tokens, and so are cut to it; a quarter of each is the question."""
    source = (ROOT / "data" / "aspcoder_train.csv").read_text(encoding="utf-8")
    file = folder / "rows.csv"
    with file.open("w", encoding="utf-8", newline="") as out:
        table = csv.writer(out)
        table.writerow(["category", "human", "assistant"])
        for number in range(count):
            start = 977 * number % len(source)
            text = (source[start:] + source * (1 + 12 * length // len(source)))[: 12 * length]
            table.writerow(["code", f"{number} {text[: length // 2]}", text])
    return file


def _too_large(folder: Path, mode: str, memory: int | None) -> str | None:
    """Return why a mode cannot fit into the GPU's memory, or None."""
    if mode != "full" or memory is None:
        return None
    parameters = sum(f.stat().st_size for f in folder.glob("*.safetensors")) // 2  # held in bf16
    needed = FULL_BYTES * parameters
    return None if needed < memory else f"it needs {needed / 1e9:.0f} GB, and the GPU has {memory / 1e9:.0f}"


def _measured(asked: argparse.Namespace, case: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Run one trainer in a process of its own."""
    own, defaults = case["trainer"] in (OWN, DEFAULTS), case["trainer"] == DEFAULTS
    batch = DEFAULT_STEP if defaults else BATCH[case["shape"]]
    rows = _make_rows(asked.folder, asked.length, asked.steps * batch)
    with tempfile.TemporaryDirectory() as out:
        if own:
            settings = _settings(asked, case["mode"], rows)
            settings += _like_the_others(asked, batch) if not defaults else ["per_device_train_batch_size=auto"]
            command = [sys.executable, "train.py", *settings, *asked.set, f"output_dir={out}/run"]
        else:
            command = [sys.executable, __file__, "--part", case["trainer"], "--folder", str(asked.folder)]
            command += ["--mode", case["mode"], "--rows", str(rows), "--batch", str(batch)]
            command += ["--length", str(asked.length), "--checkpointing", asked.checkpointing]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            return {"not_run": "the time was over"}
        if done.returncode:
            return {"failed": (done.stderr.strip().splitlines() or ["?"])[-1][:300]}
        if own:
            return _of_metrics(Path(out) / "run" / "metrics.jsonl")
        return dict(json.loads(done.stdout.splitlines()[-1]))


def _settings(asked: argparse.Namespace, mode: str, rows: Path) -> list[str]:
    return [
        f"mode={mode}", f"model_name_or_path={asked.folder}", f"train_file_path={rows.parent}",
        f"train_file_name={rows.name}", f"max_seq_length={asked.length}", "eval_ratio=0", "save_strategy=no",
        "tracker=none", f"logging_steps={WARM}", "warmup_steps=0", "disable_tqdm=true", "learning_rate=1e-5",
    ]  # fmt: skip


def _like_the_others(asked: argparse.Namespace, batch: int) -> list[str]:
    return [
        "precision=bf16", f"per_device_train_batch_size={batch}", "gradient_accumulation_steps=1", f"lora_rank={RANK}",
        f"lora_alpha={ALPHA}", "lora_dropout=0", "optim=adamw", f"gradient_checkpointing={asked.checkpointing}",
        "max_grad_norm=1.0",
    ]  # fmt: skip


def _of_metrics(file: Path) -> dict[str, Any]:
    records = [r for r in map(json.loads, file.read_text().splitlines()) if "train/loss" in r]
    counted = [r for r in records if r["step"] > WARM]

    def median(key: str) -> float | None:
        values = [r[key] for r in counted if key in r]
        return round(statistics.median(values), 4) if values else None

    return {
        "tokens_per_second": median("perf/tokens_per_second"),
        "mfu": median("perf/mfu"),
        "peak_memory_gb": median("perf/peak_memory_gb"),
        "first_loss": round(records[0]["train/loss"], 4),
    }


def _batches(asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the rows as ids and labels, cut to the length, as sftx makes them."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(asked.folder)
    rows = list(csv.DictReader(asked.rows.open(encoding="utf-8", newline="")))
    for first in range(0, len(rows), asked.batch):
        ids, labels = [], []
        for row in rows[first : first + asked.batch]:
            turn = [{"role": "user", "content": row["human"]}]
            text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
            prompt = tokenizer(text, add_special_tokens=False).input_ids
            whole = (prompt + tokenizer(row["assistant"], add_special_tokens=False).input_ids)[: asked.length]
            ids.append(whole)
            labels.append([-100] * len(prompt) + whole[len(prompt) :])
        yield {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}


def _model(asked: argparse.Namespace) -> Any:
    """Return the model as transformers and PEFT make it."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    options: dict[str, Any] = {"dtype": torch.float32 if asked.mode == "full" else torch.bfloat16}
    if asked.mode == "qlora":
        four_bits = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **four_bits)
        options |= {"quantization_config": quantization, "device_map": {"": device}}
    model = AutoModelForCausalLM.from_pretrained(asked.folder, attn_implementation="sdpa", **options).to(device)
    if asked.mode == "qlora":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if asked.checkpointing == "true":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if asked.mode != "full":
        layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=layers, lora_dropout=0.0))
    return model.train()


def plain_part(asked: argparse.Namespace) -> dict[str, Any]:
    """Train with transformers and PEFT in a loop of a few lines."""
    import torch

    model = _model(asked)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=True)
    times, losses, tokens = [], [], []
    for number, batch in enumerate(_batches(asked)):
        if number == WARM:
            _wait()
        start = time.perf_counter()
        inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
        with torch.autocast(model.device.type, dtype=torch.bfloat16):
            loss = model(**inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if number < WARM:
            _wait()
        times.append(time.perf_counter() - start)
        tokens.append((batch["input_ids"].shape, int((batch["labels"][:, 1:] != -100).sum())))
    start = time.perf_counter()
    _wait()
    times[-1] += time.perf_counter() - start
    return _of_steps(model, times, tokens, losses[0].item())


def trl_part(asked: argparse.Namespace) -> dict[str, Any]:
    """Train with TRL's SFTTrainer, where it is installed."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    batches = list(_batches(asked))
    ids = [row for batch in batches for row in batch["input_ids"].tolist()]
    labels = [row for batch in batches for row in batch["labels"].tolist()]
    data = Dataset.from_dict({"input_ids": ids, "labels": labels})
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if len(times) == WARM:
                _wait()
            times.append(-time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if len(times) in (WARM, len(batches)):
                _wait()
            times[-1] += time.perf_counter()

    out = tempfile.mkdtemp()
    model = _model(asked)
    config = SFTConfig(
        out, per_device_train_batch_size=asked.batch, bf16=True, max_length=asked.length, report_to="none",
        gradient_checkpointing=False, learning_rate=1e-5, logging_steps=WARM, save_strategy="no", max_grad_norm=1.0,
        use_cpu=not torch.cuda.is_available(), dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(asked.folder)
    trainer = SFTTrainer(model, config, train_dataset=data, processing_class=tokenizer, callbacks=[Clock()])
    trainer.train()
    tokens = [(b["input_ids"].shape, int((b["labels"][:, 1:] != -100).sum())) for b in batches]
    return _of_steps(model, times, tokens, next(r["loss"] for r in trainer.state.log_history if "loss" in r))


PARTS = {"model": model_part, "plain": plain_part, "trl": trl_part}


def _wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _of_steps(model: Any, times: list[float], tokens: list[tuple[Any, int]], first_loss: float) -> dict[str, Any]:
    """Return the figures of a loop, its operations counted as sftx counts its own."""
    import torch

    from sftx.model.adapt import AdaptedModel
    from sftx.training.measure.flops import work_of
    from sftx.training.measure.perf import peak_flops, peak_memory

    work = work_of(AdaptedModel(model, trained_dtype=torch.float32, gradient_checkpointing=False))
    assert work is not None
    peak = peak_flops(model.device, torch.bfloat16 if model.device.type == "cuda" else torch.float32)
    seconds = sum(times[WARM:])
    count = sum(rows * length for (rows, length), _ in tokens[WARM:])
    flops = sum(work.flops([length] * rows, supervised) for (rows, length), supervised in tokens[WARM:])
    return {
        "tokens_per_second": round(count / seconds, 1),
        "mfu": round(flops / seconds / peak, 4) if peak else None,
        "peak_memory_gb": round(peak_memory(model.device) / 1e9, 3),
        "first_loss": round(first_loss, 4),
    }


def _ratios(results: list[dict[str, Any]]) -> dict[str, float]:
    """Return sftx's tokens a second as a multiple of the others'."""
    rates = {(r["shape"], r["mode"], r["trainer"]): r.get("tokens_per_second") for r in results}
    return {
        f"{shape} {mode} / {trainer}": round(rates[shape, mode, "sftx"] / rate, 2)
        for (shape, mode, trainer), rate in rates.items()
        if trainer != "sftx" and rate and rates.get((shape, mode, "sftx"))
    }


if __name__ == "__main__":
    sys.exit(main())
