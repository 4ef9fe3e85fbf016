"""What does it cost to make tokens of 100,000 rows? One JSON line: CPU-seconds, memory, and the ratio to a peer.

    SFTX_SHARED=<folder with data/> python benchmarks/tokenise.py [--rows N] [--model FOLDER] [--workers N]
    ... --against trl --peer-python <venv with trl>/bin/python        ... --against llamafactory --peer-python ...

The rows are recombined from the sentences of real Chinese and English files. What is measured begins when
libraries, tokenizer and data set are loaded, and ends when the rows can be trained on: for sftx `open_rows`
on the converted corpus (`read_cpu_seconds` is what converting it took), for TRL
`SFTTrainer._prepare_dataset`, for LLaMA-Factory `get_dataset`.
"""

from __future__ import annotations

import argparse
import csv
import importlib.machinery
import json
import math
import os
import random
import re
import resource
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SOURCES = ("alpaca_zh_demo.csv", "self_instruct_seed.csv", "identity.csv", "questions_gen_postgres.csv")
SENTENCE = re.compile(r"[^。！？.!?\n]*[。！？.!?\n]+\s?|[^。！？.!?\n]+")
LETTERS = {True: (28, 70), False: (60, 172)}
"""Median letters of a question and an answer, Chinese and not: together some 160 tokens of qwen-tiny."""
SPREAD = 0.7
"""Of the logarithm of the lengths: the longest of 100,000 rows is some twenty times the median."""
INSTALL = {"trl": "pip install trl", "llamafactory": "pip install llamafactory==0.9.5"}
OFFLINE = {
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false", "DISABLE_VERSION_CHECK": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}  # fmt: skip


def main() -> int:
    asked = _arguments()
    if asked.part:
        print(json.dumps(PARTS[asked.part](asked)), flush=True)
        return 0
    from sftx.errors import SftxError

    if asked.against and not asked.peer_python:
        raise SftxError(f"--against {asked.against}: name the Python that has it: --peer-python <venv>/bin/python.")
    with tempfile.TemporaryDirectory(prefix="sftx-tokenise-") as scratch:
        asked.folder = asked.folder or Path(scratch)
        asked.model = str(_model(asked.model))
        if asked.against:
            _check_peer(asked)
        make_corpus(asked)
        report = _measure(asked, Path(scratch))
    print(json.dumps(report, ensure_ascii=False))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--stretch", type=float, default=1.0, help="make every row so many times as long")
    parser.add_argument("--model", default="qwen-tiny", help="the embedded model, or a folder with a tokenizer")
    parser.add_argument("--workers", type=int, help="processes that tokenise; default: as sftx chooses")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--against", choices=sorted(INSTALL))
    parser.add_argument("--peer-python", help="the Python of an environment with the peer")
    parser.add_argument("--peer-procs", type=int, default=1, help="the peer's processes")
    parser.add_argument("--form", default="prompt-completion", choices=["prompt-completion", "assistant-only"])
    parser.add_argument("--folder", type=Path, help="keep the corpus here, and use it again")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    return parser.parse_args()


# --- the corpus ------------------------------------------------------------------------------------------------------


def make_corpus(asked: argparse.Namespace) -> None:
    """Write the same rows as sftx's JSONL and in the peers' forms."""
    name = asked.folder / "rows.jsonl"
    mark = asked.folder / "made"
    recipe = json.dumps([asked.rows, asked.stretch, LETTERS, SPREAD])
    if mark.is_file() and mark.read_text() == recipe:
        return
    asked.folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    kinds = _sentences()
    with (
        name.open("w", encoding="utf-8") as rows,
        (asked.folder / "pairs.jsonl").open("w", encoding="utf-8") as pairs,
        (asked.folder / "chats.jsonl").open("w", encoding="utf-8") as chats,
        (asked.folder / "alpaca.jsonl").open("w", encoding="utf-8") as alpaca,
    ):
        for _ in range(asked.rows):
            kind = draw.choice(list(kinds))
            human, answer = (_text(draw, kinds[kind], m * asked.stretch) for m in LETTERS[kind.endswith("zh_demo")])
            question = {"role": "user", "content": human}
            reply = {"role": "assistant", "content": answer}
            for file, row in (
                (rows, {"category": kind, "human": human, "assistant": answer}),
                (pairs, {"prompt": [question], "completion": [reply]}),
                (chats, {"messages": [question, reply]}),
                (alpaca, {"instruction": human, "input": "", "output": answer}),
            ):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    (asked.folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "alpaca.jsonl"}}))
    mark.write_text(recipe)


def _sentences() -> dict[str, list[str]]:
    from sftx.errors import SftxError

    shared = os.environ.get("SFTX_SHARED")
    if not shared:
        raise SftxError("SFTX_SHARED is not set: name the folder that holds data/alpaca_zh_demo.csv and the others.")
    found = {}
    for name in SOURCES:
        with (Path(shared) / "data" / name).open(encoding="utf-8-sig", newline="") as file:
            texts = [row[column] for row in csv.DictReader(file) for column in ("human", "assistant")]
        found[name.removesuffix(".csv")] = [s for text in texts for s in SENTENCE.findall(text) if s.strip()]
    return found


def _text(draw: random.Random, sentences: list[str], median: float) -> str:
    wanted = draw.lognormvariate(math.log(median), SPREAD)
    text = draw.choice(sentences)
    while len(text) < wanted:
        text += draw.choice(sentences)
    return text[: max(8, int(wanted))].strip() or "?"


def _model(name: str) -> Path:
    from sftx.model.builtin import NAME, ensure_builtin

    return ensure_builtin() if name == NAME else Path(name).resolve()


# --- sftx ------------------------------------------------------------------------------------------------------------


def sftx_part(asked: argparse.Namespace) -> dict[str, Any]:
    """Open the rows; the first time that tokenises them."""
    from transformers import AutoTokenizer

    from sftx.data import store, tokenise, writer  # noqa: F401 - loaded before the clock starts, as the peers' are
    from sftx.data.cache import RecordFile, open_rows
    from sftx.data.corpus import Corpus
    from sftx.data.policy import EncodePolicy
    from sftx.data.template import ChatTemplate

    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    template = ChatTemplate(tokenizer, tokenizer.chat_template, [tokenizer.eos_token])
    started = cpu()
    loaded = Corpus().load(str(asked.folder), "rows.jsonl", key="train_file_name", keep_columns=False)
    files = [RecordFile(str(f["path"]), str(f["sha256"])) for f in loaded.files]
    before, clock = cpu(), time.perf_counter()
    rows = open_rows(loaded.records, files, template, EncodePolicy(asked.max_length), workers=asked.workers)
    return measured(before, clock, len(rows), rows.tokens) | {
        "open_seconds": round(time.perf_counter() - clock, 3),
        "read_cpu_seconds": round(before - started, 2),
        "supervised_tokens": rows.totals.supervised,
        "corpus_mb": round((asked.folder / "rows.jsonl").stat().st_size / 1e6, 1),
        "store_mb": round(rows.totals.bytes / 1e6, 1),
    }


def cpu() -> float:
    """Return the CPU-seconds of this process and of those it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def measured(before: float, clock: float, rows: int, tokens: int) -> dict[str, Any]:
    used, wall = cpu() - before, time.perf_counter() - clock
    return {"cpu_seconds": round(used, 2), "wall_seconds": round(wall, 2), "rows": rows, "tokens": tokens}


# --- the peers; these run in their own environments, without sftx ----------------------------------------------------


def trl_part(asked: argparse.Namespace) -> dict[str, Any]:
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    result: dict[str, Any] = {}
    prepare = SFTTrainer._prepare_dataset

    def timed(self: Any, *arguments: Any, **named: Any) -> Any:
        before, clock = cpu(), time.perf_counter()
        prepared = prepare(self, *arguments, **named)
        result.update(measured(before, clock, len(prepared), sum(map(len, prepared["input_ids"]))))
        return prepared

    SFTTrainer._prepare_dataset = timed
    together = asked.form == "assistant-only"
    file = asked.folder / ("chats.jsonl" if together else "pairs.jsonl")
    scratch = tempfile.mkdtemp(dir=asked.folder)
    data = load_dataset("json", data_files=str(file), split="train", cache_dir=scratch)
    config = SFTConfig(
        output_dir=scratch, max_length=asked.max_length, use_cpu=True, bf16=False, report_to="none",
        assistant_only_loss=together, dataset_num_proc=asked.peer_procs if asked.peer_procs > 1 else None,
    )  # fmt: skip
    SFTTrainer(asked.model, args=config, train_dataset=data)
    return result


def llamafactory_part(asked: argparse.Namespace) -> dict[str, Any]:
    import types

    audio = types.ModuleType("torchaudio")  # LLaMA-Factory imports it at once; PyPI's needs CUDA
    audio.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    sys.modules["torchaudio"] = audio
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    scratch = tempfile.mkdtemp(dir=asked.folder)
    model_args, data_args, training_args, _, _ = get_train_args(
        {
            "model_name_or_path": asked.model, "stage": "sft", "do_train": True, "finetuning_type": "lora",
            "dataset": "rows", "dataset_dir": str(asked.folder), "template": "qwen", "default_system": "",
            "cutoff_len": asked.max_length, "output_dir": scratch, "cache_dir": scratch, "report_to": "none",
            "use_cpu": True, "bf16": False, "fp16": False, "preprocessing_num_workers": asked.peer_procs,
        }
    )  # fmt: skip
    module = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
    before, clock = cpu(), time.perf_counter()
    data = get_dataset(template, model_args, data_args, training_args, stage="sft", **module)["train_dataset"]
    return measured(before, clock, len(data), sum(map(len, data["input_ids"])))


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "sftx": sftx_part,
    "trl": trl_part,
    "llamafactory": llamafactory_part,
}


# --- measuring -------------------------------------------------------------------------------------------------------


def _measure(asked: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    cache = {"SFTX_CACHE": str(scratch / "cache")}
    cold, memory = _run(asked, "sftx", sys.executable, cache)
    warm, _ = _run(asked, "sftx", sys.executable, cache)
    report = {
        "benchmark": "tokenise",
        "command": shlex.join(["python", "benchmarks/tokenise.py", *_shown(sys.argv[1:])]),
        "model": Path(asked.model).name,
        "workers": asked.workers,
        "cores": len(os.sched_getaffinity(0)),
        **cold,
        "rows_per_second": round(cold["rows"] / cold["wall_seconds"]),
        "tokens_per_second": round(cold["tokens"] / cold["wall_seconds"]),
        "tokens_per_cpu_second": round(cold["tokens"] / cold["cpu_seconds"]),
        **memory,
        "warm_open_seconds": warm["open_seconds"],
    }
    if asked.against:
        environment = {"HF_HOME": str(scratch / "hf"), "HF_DATASETS_CACHE": str(scratch / "hf")}
        peer, its_memory = _run(asked, asked.against, asked.peer_python, environment)
        report |= {f"{asked.against}_{name}": value for name, value in (peer | its_memory).items()}
        report["cpu_ratio"] = round(peer["cpu_seconds"] / cold["cpu_seconds"], 2)
    return report


def _shown(words: Sequence[str]) -> list[str]:
    """Return the command line without this machine's paths."""
    return [f"<{Path(word).name}>" if word.startswith(("/", ".")) else word for word in words]


def _run(
    asked: argparse.Namespace, part: str, python: str, environment: dict[str, str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run one part in a process of its own; return what it says, and the most memory it and its own had."""
    from sftx.errors import SftxError

    words = ["--part", part, "--folder", str(asked.folder), "--model", asked.model, "--form", asked.form]
    words += ["--max-length", str(asked.max_length), "--peer-procs", str(asked.peer_procs)]
    words += ["--workers", str(asked.workers)] if asked.workers is not None else []
    settings = os.environ | OFFLINE | environment
    if part != "sftx":
        settings.pop("PYTHONPATH", None)
    process = subprocess.Popen([python, __file__, *words], stdout=subprocess.PIPE, text=True, env=settings)
    memory = {"peak_pss_mb": 0.0, "peak_uss_mb": 0.0, "processes": 0.0}
    watch = threading.Thread(target=_watch, args=(process, memory))
    watch.start()
    said, _ = process.communicate()
    watch.join()
    if process.returncode:
        raise SftxError(f"the part `{part}` ended with exit code {process.returncode}; what it said is above.")
    return json.loads(said.splitlines()[-1]), memory


def _watch(process: subprocess.Popen[str], memory: dict[str, float]) -> None:
    import psutil

    while process.poll() is None:
        sums = [0.0, 0.0, 0.0]
        try:
            top = psutil.Process(process.pid)
            family = [top, *top.children(recursive=True)]
        except psutil.Error:
            return
        for member in family:
            try:
                full = member.memory_full_info()
            except psutil.Error:
                continue
            sums = [sums[0] + full.pss / 1e6, sums[1] + full.uss / 1e6, sums[2] + 1]
        for name, value in zip(memory, sums, strict=True):
            memory[name] = round(max(memory[name], value))
        time.sleep(0.2)


def _check_peer(asked: argparse.Namespace) -> None:
    from sftx.errors import SftxError

    code = f"import importlib.util as u, sys; sys.exit(u.find_spec({asked.against!r}) is None)"
    try:
        found = subprocess.run([asked.peer_python, "-c", code], env={"PATH": os.environ.get("PATH", "")}).returncode
    except OSError as error:
        raise SftxError(f"--peer-python {asked.peer_python}: cannot be run ({error.strerror}).") from error
    if found:
        raise SftxError(
            f"--peer-python {asked.peer_python}: has no {asked.against}. In an environment of its own: "
            f"{INSTALL[asked.against]}."
        )


if __name__ == "__main__":
    if "--part" in sys.argv:
        sys.exit(main())  # a peer's environment has no sftx
    from sftx.errors import reported

    with reported():
        sys.exit(main())
