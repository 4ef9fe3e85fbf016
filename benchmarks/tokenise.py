"""What does it cost to make rows of a file? JSON lines: CPU-seconds, memory, and the ratios to the peers.

    SFTX_SHARED=<folder with data/> python benchmarks/tokenise.py [--rows N | --megabytes N] [--model FOLDER]
    ... --against trl,llamafactory --peer-python <venv with trl>/bin/python,<venv with llamafactory>/bin/python

A line for each part that ran, one after the other and `--repeat` times over, then one that sums up: of each figure
the median. A ratio is sftx's CPU-seconds by the peer's, so below 1 sftx needs less; the peer's are those of the
same round.

`prepare` begins with a data set that is read and ends with rows that can be trained on: for sftx it is
`prepare.tokenise`, for TRL `SFTTrainer._prepare_dataset`, for LLaMA-Factory `get_dataset` without `load_dataset`.
`total` begins with the file: with sftx's `prepare.select` (from CSV, which it checks cell by cell and converts to a
store that later runs open), and with the peers' `load_dataset` (from JSON lines). Loading libraries and the
tokenizer is part of neither.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import json
import os
import re
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from corpus import CSV, FORMS, make_corpus

INSTALL = {"trl": "pip install trl", "llamafactory": "pip install llamafactory==0.9.5"}
SAME = 0.02
"""Rows are the same amount of work when their tokens are equal to within this share."""
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

    if len(asked.against) != len(asked.peer_python):
        raise SftxError("--against: name for each peer the Python that has it: --peer-python <venv>/bin/python,...")
    with tempfile.TemporaryDirectory(prefix="sftx-tokenise-") as scratch:
        asked.folder = asked.folder or Path(scratch)
        asked.model = str(_model(asked.model))
        for peer, python in zip(asked.against, asked.peer_python, strict=True):
            _check_peer(peer, python)
        facts = make_corpus(asked)
        rounds = []
        for _ in range(asked.repeat):
            rounds.append(_round(asked, Path(scratch)))
    print(json.dumps(_summary(asked, facts, rounds), ensure_ascii=False))
    return 0


def _arguments() -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return [word for word in text.split(",") if word]

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--megabytes", type=float, help="make a file of this size instead")
    parser.add_argument("--stretch", type=float, default=1.0, help="make every row so many times as long")
    parser.add_argument("--model", default="qwen-tiny", help="the embedded model, or a folder")
    parser.add_argument("--workers", type=int, help="processes that tokenise; default: as sftx chooses")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--against", type=names, default=[], help=f"some of {','.join(INSTALL)}")
    parser.add_argument("--peer-python", type=names, default=[], help="the Pythons of environments with the peers")
    parser.add_argument("--peer-procs", type=int, default=1, help="the peers' processes")
    parser.add_argument("--form", default="prompt-completion", choices=["prompt-completion", "assistant-only"])
    parser.add_argument("--folder", type=Path, help="keep the corpus here, and use it again")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--policy", default="keep", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    unknown = set(asked.against) - set(INSTALL)
    if unknown:
        parser.error(f"--against: no peer {', '.join(sorted(unknown))}; there are {', '.join(INSTALL)}")
    return asked


def _model(name: str) -> Path:
    from sftx.model.loading.builtin import NAME, ensure_builtin

    return ensure_builtin() if name == NAME else Path(name).resolve()


# --- sftx ------------------------------------------------------------------------------------------------------------


def sftx_part(asked: argparse.Namespace) -> dict[str, Any]:
    """Read the file and tokenise it, as a run does; the second time both are there already."""
    from sftx.build import build
    from sftx.config.checks.check import freeze
    from sftx.config.composition.prepare import compose_checked
    from sftx.data.prepare import select
    from sftx.data.prepare import tokenise as to_rows
    from sftx.data.store import tokenise  # noqa: F401 - loaded before the clock starts, as the peers' are
    from sftx.model.loading.family import family_named, family_of
    from sftx.model.loading.load import find_model, load_template

    words = {
        "model_name_or_path": asked.model, "train_file_path": asked.folder.resolve(), "train_file_name": CSV,
        "max_seq_length": asked.max_length, "eval_ratio": 0, "data": "csv", "data.duplicates": asked.policy,
    }  # fmt: skip
    words |= {} if asked.workers is None else {"data.num_workers": asked.workers}
    config = freeze(compose_checked([f"{key}={value}" for key, value in words.items()]))
    source = find_model(config.model_name_or_path)
    family, _ = family_of(config.model, source.model_type, downloaded=source.downloaded)
    template = load_template(source, family, config.template_name, family_named)
    clock = Clock()
    selection = select(config, build(config.data))
    read = clock.lap()
    rows = to_rows(selection, config, template).train
    return figures(read, clock.lap(), len(rows), rows.tokens)


class Clock:
    """CPU-seconds, of this process and of those it has waited for, and seconds, since the last lap."""

    def __init__(self) -> None:
        self._last = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(u.ru_utime + u.ru_stime for u in used), time.perf_counter()

    def lap(self) -> tuple[float, float]:
        now, before = self._now(), self._last
        self._last = self._now()
        return now[0] - before[0], now[1] - before[1]


def figures(read: tuple[float, float], prepare: tuple[float, float], rows: int, tokens: int) -> dict[str, Any]:
    """Return what a part has measured; `read` and `prepare` are CPU-seconds and seconds."""
    return {
        "rows": rows,
        "tokens": tokens,
        "read_cpu_s": round(read[0], 2),
        "prepare_cpu_s": round(prepare[0], 2),
        "total_cpu_s": round(read[0] + prepare[0], 2),
        "read_s": round(read[1], 3),
        "prepare_s": round(prepare[1], 3),
        "total_s": round(read[1] + prepare[1], 3),
    }


# --- the peers; these run in their own environments, without sftx ----------------------------------------------------


def trl_part(asked: argparse.Namespace) -> dict[str, Any]:
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    seen: list[Any] = []
    prepare = SFTTrainer._prepare_dataset

    def timed(self: Any, *arguments: Any, **named: Any) -> Any:
        clock = Clock()
        prepared = prepare(self, *arguments, **named)
        seen[:] = clock.lap(), prepared
        return prepared

    SFTTrainer._prepare_dataset = timed
    together = asked.form == "assistant-only"
    file = asked.folder / FORMS["chats" if together else "pairs"]
    scratch = tempfile.mkdtemp(dir=asked.folder)
    clock = Clock()
    data = load_dataset("json", data_files=str(file), split="train", cache_dir=scratch)
    read = clock.lap()
    config = SFTConfig(
        output_dir=scratch, max_length=asked.max_length, use_cpu=True, bf16=False, report_to="none",
        assistant_only_loss=together, dataset_num_proc=asked.peer_procs if asked.peer_procs > 1 else None,
    )  # fmt: skip
    SFTTrainer(asked.model, args=config, train_dataset=data)
    return figures(read, seen[0], len(seen[1]), _tokens(seen[1]))


def llamafactory_part(asked: argparse.Namespace) -> dict[str, Any]:
    import types

    audio = types.ModuleType("torchaudio")  # LLaMA-Factory imports it at once; PyPI's needs CUDA
    audio.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    sys.modules["torchaudio"] = audio
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer, loader
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    reads: list[tuple[float, float]] = []
    load = loader.load_dataset

    def timed(*arguments: Any, **named: Any) -> Any:
        clock = Clock()
        loaded = load(*arguments, **named)
        reads.append(clock.lap())
        return loaded

    loader.load_dataset = timed
    scratch = tempfile.mkdtemp(dir=asked.folder)
    settings = {
        "model_name_or_path": asked.model, "stage": "sft", "do_train": True, "finetuning_type": "lora",
        "dataset": "rows", "dataset_dir": str(asked.folder), "template": "qwen", "cutoff_len": asked.max_length,
        "output_dir": scratch, "cache_dir": scratch, "report_to": "none", "use_cpu": True, "bf16": False,
        "fp16": False, "preprocessing_num_workers": asked.peer_procs, "default_system": _system(asked.model),
    }  # fmt: skip
    model_args, data_args, training_args, _, _ = get_train_args(settings)
    module = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
    clock = Clock()
    data = get_dataset(template, model_args, data_args, training_args, stage="sft", **module)["train_dataset"]
    whole, (read,) = clock.lap(), reads
    return figures(read, (whole[0] - read[0], whole[1] - read[1]), len(data), _tokens(data))


def _system(model: str) -> str:
    """Return what the model's own template puts before a conversation that has no system's turn."""
    from transformers import AutoTokenizer

    text = AutoTokenizer.from_pretrained(model).apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    found = re.match(r"<\|im_start\|>system\n(.*?)<\|im_end\|>", text, re.DOTALL)
    return found.group(1) if found else ""


def _tokens(data: Any) -> int:
    return sum(len(ids) for batch in data.iter(1000) for ids in batch["input_ids"])


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "sftx": sftx_part,
    "trl": trl_part,
    "llamafactory": llamafactory_part,
}


# --- measuring -------------------------------------------------------------------------------------------------------


def _round(asked: argparse.Namespace, scratch: Path) -> dict[str, dict[str, Any]]:
    """Run sftx with nothing in its cache, the peers, and sftx again with all of it there."""
    ours = {"SFTX_CACHE": tempfile.mkdtemp(dir=scratch)}
    found: dict[str, dict[str, Any]] = {}

    def measure(name: str, part: str, python: str, environment: dict[str, str], *more: str) -> None:
        found[name] = _run(asked, part, python, environment, *more)
        print(json.dumps({"part": name} | found[name]), flush=True)

    measure("sftx", "sftx", sys.executable, ours)
    for peer, python in zip(asked.against, asked.peer_python, strict=True):
        theirs = tempfile.mkdtemp(dir=scratch)
        measure(peer, peer, python, {"HF_HOME": theirs, "HF_DATASETS_CACHE": theirs})
        shutil.rmtree(theirs)
    measure("warm", "sftx", sys.executable, ours)
    measure("warm_drop_exact", "sftx", sys.executable, ours, "--policy", "drop_exact")
    shutil.rmtree(ours["SFTX_CACHE"])
    return found


def _summary(asked: argparse.Namespace, facts: dict[str, Any], rounds: list[dict[str, Any]]) -> dict[str, Any]:
    def median(values: Sequence[float], digits: int = 2) -> float:
        return round(statistics.median(values), digits)

    cold = [found["sftx"] for found in rounds]
    report = {
        "benchmark": "tokenise",
        "command": shlex.join(["python", "benchmarks/tokenise.py", *_shown(sys.argv[1:])]),
        "model": Path(asked.model).name,
        "cores": len(os.sched_getaffinity(0)),
        "rounds": len(rounds),
        **facts,
        **{name: median([c[name] for c in cold]) for name in cold[0]},
        "tokens_per_cpu_s": round(statistics.median(c["tokens"] / c["prepare_cpu_s"] for c in cold)),
        "warm_s": median([found["warm"]["total_s"] for found in rounds], 3),
        "warm_drop_exact_s": median([found["warm_drop_exact"]["total_s"] for found in rounds], 3),
    }
    for peer in asked.against:
        theirs = [found[peer] for found in rounds]
        for name in ("prepare", "total"):
            ratios = [c[f"{name}_cpu_s"] / t[f"{name}_cpu_s"] for c, t in zip(cold, theirs, strict=True)]
            report[f"{name}_cpu_sftx_by_{peer}"] = median(ratios, 3)
            report[f"{name}_cpu_sftx_by_{peer}_range"] = [round(min(ratios), 3), round(max(ratios), 3)]
        share = cold[0]["tokens"] / theirs[0]["tokens"]
        report[f"tokens_sftx_by_{peer}"] = round(share, 4)
        report[f"{peer}_same_work"] = abs(share - 1) <= SAME and cold[0]["rows"] == theirs[0]["rows"]
    return report


def _shown(words: Sequence[str]) -> list[str]:
    """Return the command line without this machine's paths."""
    return [f"<{Path(word).name}>" if word.startswith(("/", ".")) else word for word in words]


def _run(asked: argparse.Namespace, part: str, python: str, environment: dict[str, str], *more: str) -> dict[str, Any]:
    """Run one part in a process of its own; return what it says, and the most memory it and its own had."""
    from sftx.errors import SftxError

    words = ["--part", part, "--folder", str(asked.folder), "--model", asked.model, "--form", asked.form]
    words += ["--max-length", str(asked.max_length), "--peer-procs", str(asked.peer_procs), *more]
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
    return json.loads(said.splitlines()[-1]) | memory


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
        time.sleep(0.5)


def _check_peer(peer: str, python: str) -> None:
    from sftx.errors import SftxError

    code = f"import importlib.util as u, sys; sys.exit(u.find_spec({peer!r}) is None)"
    try:
        found = subprocess.run([python, "-c", code], env={"PATH": os.environ.get("PATH", "")}).returncode
    except OSError as error:
        raise SftxError(f"--peer-python {python}: cannot be run ({error.strerror}).") from error
    if found:
        raise SftxError(f"--peer-python {python}: has no {peer}. In an environment of its own: {INSTALL[peer]}.")


if __name__ == "__main__":
    if "--part" in sys.argv:
        sys.exit(main())  # a peer's environment has no sftx
    from sftx.errors import reported

    with reported():
        sys.exit(main())
