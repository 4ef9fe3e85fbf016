"""Starts one run in a process of its own and returns what it measured."""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from work import ROOT, WORK, rows_file, rows_of

from peer_parts.cases import ALPHA, CLIP, FASTEST, LENGTH, RANK, SEED, TARGETS, Case

PARTS = Path(__file__).resolve().parent
OFFLINE = {
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "WANDB_DISABLED": "true",
    "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false", "DISABLE_VERSION_CHECK": "1",
    "ACCELERATE_USE_CPU": "true", "PYTHONUNBUFFERED": "1",
}  # fmt: skip
MADE = "made"
"""The file that says that a run in this folder came to its end."""
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
PATH = re.compile(r"/[\w./-]+/(?=[\w.-]+)")
"""The folders of a path: an error is told without this machine's."""


@functools.cache
def machine() -> str:
    """Return what a figure was measured on."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    named = cpu[1] if cpu else platform.machine()
    return f"{named}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB, Python {platform.python_version()}"


def data_folder(count: int) -> Path:
    """Return a folder with the rows in the peers' forms, made when it is not there yet."""
    table = rows_file(count)
    folder = WORK / f"peers-{table.stem}"
    if not (folder / "dataset_info.json").is_file():
        folder.mkdir(exist_ok=True)
        pairs = [(human, answer) for _, human, answer in rows_of(table)]
        with (folder / "messages.jsonl").open("w", encoding="utf-8") as out:
            for human, answer in pairs:
                turns = [{"role": "user", "content": human}, {"role": "assistant", "content": answer}]
                out.write(json.dumps({"messages": turns}) + "\n")
        plain = [{"instruction": human, "input": "", "output": answer} for human, answer in pairs]
        (folder / "rows.json").write_text(json.dumps(plain), encoding="utf-8")
        (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    return folder


def make_work(case: Case) -> None:
    """Make the model and the rows of a case in another process, whose memory and threads are not this one's."""
    code = f"import work; work.model_folder({case.model!r}); work.rows_file({case.rows})"
    settings = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "benchmarks"), *sys.path])}
    subprocess.run([sys.executable, "-c", code], check=True, env=settings, stdout=sys.stderr)


def spec_of(case: Case, peer: str, model: Path) -> dict[str, Any]:
    """Return what a child script must know."""
    folder = data_folder(case.rows)
    family = json.loads((model / "config.json").read_text(encoding="utf-8"))["model_type"]
    return case.facts() | {
        "peer": peer, "model_folder": str(model), "family": family, "data_folder": str(folder),
        "messages": str(folder / "messages.jsonl"), "csv": str(rows_file(case.rows)),
        "litgpt_folder": str(WORK / f"litgpt-{model.name}"), "length": LENGTH, "rank": RANK, "alpha": ALPHA,
        "clip": CLIP, "seed": SEED, "targets": TARGETS,
        "batching": FASTEST[peer] if case.batching == "fastest" else case.batching,
    }  # fmt: skip


def sftx_words(spec: Mapping[str, Any]) -> list[str]:
    """Return the command line of `train.py` for a run."""
    table = Path(spec["csv"])
    return [
        f"mode={spec['mode']}", "optimizer=adamw", "scheduler=constant", "precision=fp32", "tracker=none", "data=csv",
        "+callback.timed._target_=sftx_part.Timed", "allow_targets=[sftx_part.*]", "template_name=chatml",
        f"model_name_or_path={spec['model_folder']}", f"train_file_path={table.parent}",
        f"train_file_name={table.name}", f"lora_rank={spec['rank']}", f"lora_alpha={spec['alpha']}", "lora_dropout=0",
        f"per_device_train_batch_size={1 if spec['batching'] == 'packed' else spec['batch']}",
        f"gradient_accumulation_steps={spec['accumulation']}", f"learning_rate={spec['rate']}",
        f"max_seq_length={spec['length']}", f"batching={spec['batching']}", f"max_grad_norm={spec['clip']}",
        f"gradient_checkpointing={str(spec['checkpointing']).lower()}", f"seed={spec['seed']}", "num_train_epochs=1",
        f"max_steps={spec['steps'] if spec['steps'] > 0 else 'null'}", "eval_ratio=0", "save_strategy=no",
        "logging_steps=1", "disable_tqdm=true", "device=cpu", "output_dir=out",
    ]  # fmt: skip


def run(spec: Mapping[str, Any], python: str, *, seconds: float) -> dict[str, Any]:
    """Make one run and return its figures, or what its error says."""
    peer, scratch = spec["peer"], _scratch(spec)
    (scratch / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
    settings = _environment(spec, scratch)
    if peer == "sftx":
        words = [python, str(ROOT / "train.py"), *sftx_words(spec)]
    else:
        words = [python, str(PARTS / f"{peer}_part.py")]
    if peer == "litgpt" and not (Path(spec["litgpt_folder"]) / "lit_model.pth").is_file():
        subprocess.run([*words, "convert"], env=settings, cwd=scratch, check=True, stdout=sys.stderr)
    loaded, started = os.getloadavg()[0], time.time()
    settings["PEERS_STARTED"] = repr(started)
    with (scratch / "log.txt").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(words, env=settings, cwd=scratch, stdout=log, stderr=subprocess.STDOUT)
        code, cpu = _wait(process, seconds)
    found = {"wall_s": round(time.time() - started, 2), "cpu_s": round(cpu, 2), "load": round(loaded, 1)}
    found["machine"] = machine()
    measured = scratch / "out.json"
    if measured.is_file():
        found |= json.loads(measured.read_text(encoding="utf-8"))
    if code == 0 and found.get("steps"):
        (scratch / MADE).touch()
        return found | {"status": "done"}
    late = f"stopped after {seconds:.0f} s" if found["wall_s"] >= seconds else _last_line(scratch / "log.txt")
    return found | {"status": "failed", "error": late}


def made_before(spec: Mapping[str, Any]) -> bool:
    """Whether the same work has been done and its caches are there."""
    return (_folder(spec) / MADE).is_file()


def _folder(spec: Mapping[str, Any]) -> Path:
    name = spec["name"].removesuffix("-warm") if spec["steps"] > 0 else "run"
    return WORK / "peer-runs" / spec["peer"] / name


def _scratch(spec: Mapping[str, Any]) -> Path:
    """Return the folder of a run: empty but for the caches of the same work, when these are to be warm."""
    scratch = _folder(spec)
    if not spec["warm"]:
        shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(scratch / "out", ignore_errors=True)
    (scratch / "out.json").unlink(missing_ok=True)
    return scratch


def _environment(spec: Mapping[str, Any], scratch: Path) -> dict[str, str]:
    settings = os.environ | OFFLINE
    settings.pop("PYTHONPATH", None)
    if spec["peer"] == "sftx":
        settings["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(PARTS)])
    caches = ("HF_HOME", "HF_DATASETS_CACHE", "MODELSCOPE_CACHE", "SFTX_CACHE")
    settings |= {name: str(scratch / "cache" / name.lower()) for name in caches}
    threads = str(spec["threads"])
    settings |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    settings |= {"PEERS_SPEC": str(scratch / "spec.json"), "PEERS_OUT": str(scratch / "out.json")}
    return settings | {"PEERS_STARTED": "0"}


def _wait(process: subprocess.Popen[bytes], seconds: float) -> tuple[int, float]:
    """Return the exit code and the CPU-seconds of a process and of those it has waited for."""
    end = time.time() + seconds
    while True:
        done, status, used = os.wait4(process.pid, os.WNOHANG)
        if done:
            process.returncode = os.waitstatus_to_exitcode(status)
            return process.returncode, used.ru_utime + used.ru_stime
        if time.time() > end:
            process.kill()
            end = float("inf")
        time.sleep(0.05)


def _last_line(log: Path) -> str:
    lines = COLOUR.sub("", log.read_text(encoding="utf-8", errors="replace")).splitlines()
    said = [line.strip() for line in lines if line.strip()]
    return PATH.sub("", said[-1])[:300] if said else "it said nothing"
