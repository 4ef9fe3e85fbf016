"""A run that is asked to end leaves a checkpoint, says so by its exit code, and goes on as if nothing had been."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.conftest import ROOT, SMALL, TWO_RANKS, over
from tests.faults import runs
from tests.faults.kill import Zygote
from tests.faults.moment import told
from tests.invariance.test_invariance import assert_same_weights, curve

from sftx.config.checks.check import freeze
from sftx.config.composition.prepare import compose_checked
from sftx.config.schema import TrainConfig
from sftx.errors import EXIT_STOPPED, RunFolderError, StoppedError
from sftx.processes import STOP_SIGNALS
from sftx.run import run
from sftx.signals import EndNow, Signals
from sftx.training.pending import StopVote
from sftx.training.saving.metrics import read_metrics

SHARED = [
    "mode=lora", "lora_dropout=0.2", "save_strategy=steps", "save_steps=100", "eval_steps=2", "max_train_rows=24",
    "max_steps=6", "scheduler=reduce_lr_on_plateau",
]  # fmt: skip


def interrupt(patch: pytest.MonkeyPatch, module: str, name: str, call: int, *numbers: signal.Signals) -> Iterator[int]:
    """Send signals when a function of a module is called for the n-th time; return what counts the calls."""
    place = importlib.import_module(module)
    original, calls = getattr(place, name), itertools.count(1)

    def function(*arguments: object, **named: object) -> object:
        if next(calls) == call:
            for number in numbers:
                os.kill(os.getpid(), number)
        return original(*arguments, **named)

    patch.setattr(place, name, function)
    return calls


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run that nothing interrupts."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("straight") / "run"
    run([composed(f"output_dir={folder}")])
    return folder


def words(*typed: str) -> list[str]:
    return over(SMALL, *over(SHARED, *typed))


def composed(*typed: str) -> TrainConfig:
    return freeze(compose_checked(words(*typed)))


def assert_same_run(one: Path, other: Path) -> None:
    assert curve(one) == curve(other)
    assert_same_weights(one, other)
    found = [
        [(r["step"], r["eval/loss"]) for r in read_metrics(f / "metrics.jsonl") if "eval/loss" in r]
        for f in (one, other)
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda n: n.name)
@pytest.mark.parametrize(
    ("module", "call", "step"),
    [
        ("sftx.training.loop", 10, 2),  # in the second micro-batch of the third step
        ("sftx.training.loop", 12, 3),  # in its fourth and last one: the step is complete
        (
            "sftx.training.measure.evaluate",
            5,
            2,
        ),  # in the second evaluation: the one before the first step has four batches
    ],
    ids=["stepping", "at the end of a step", "evaluating"],
)
def test_a_stopped_run_goes_on_exactly(
    straight: Path, tmp_path: Path, one_thread: None, module: str, call: int, step: int, number: signal.Signals
) -> None:
    """It ends at the next micro-batch: a step of which a part is missing is discarded, and made when it goes on."""
    config = composed(f"output_dir={tmp_path}")
    with pytest.MonkeyPatch.context() as patch:
        calls = interrupt(patch, module, "token_losses", call, number, number)
        with pytest.raises(StoppedError, match=rf"{number.name}: stopped after step {step} of 6, .*step-{step:06d}"):
            run([config])
    assert next(calls) == call + 1, "no micro-batch is computed after the signal"
    assert json.loads((tmp_path / "manifest.json").read_text())["status"] == "stopped"
    assert not (tmp_path / "final").exists()
    run([config])
    assert_same_run(straight, tmp_path)


@pytest.mark.parametrize("signalled", [(0,), (1,), (0, 1)])
def test_ranks_of_a_sharded_engine_stop_before_the_same_micro_batch(signalled: tuple[int, ...]) -> None:
    """They meet in every forward pass; a signal comes to each at another time, or to one of them only."""
    meeting, flags, stopped = threading.Barrier(2, timeout=10), [0.0, 0.0], {}

    def total(rank: int, flag: torch.Tensor) -> torch.Tensor:
        flags[rank] = float(flag)
        meeting.wait()
        found = torch.tensor(sum(flags))
        meeting.wait()
        return found

    def rank(number: int) -> None:
        engine: Any = SimpleNamespace(sharded=True, device=torch.device("cpu"), sum=lambda flag: total(number, flag))
        signals: Any = SimpleNamespace(received=None)
        stop = StopVote(engine, signals, 8)
        for micro_batch in range(8):
            if stop.before(micro_batch):
                stopped[number] = micro_batch
                return
            if number in signalled and micro_batch == 2 + number:  # amidst its forward pass
                signals.received = "SIGTERM"

    ranks = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    first = 2 + min(signalled)
    assert stopped == {0: first + 2, 1: first + 2}, "the boundary after the signal tells, the next one stops"


@pytest.mark.slow
def test_two_ranks_discard_a_step_of_which_one_has_made_a_part(zygote: Zygote, tmp_path: Path) -> None:
    """The other has made all of its part; the run that goes on is bitwise that of two ranks that nothing stopped."""
    typed = ["parallel=ddp", "parallel.num_processes=2", "gradient_accumulation_steps=8", "max_train_rows=null",
             "max_steps=2", "eval_steps=10"]  # fmt: skip
    log = tmp_path / "log"
    quiet = {"ranks": {"log": str(tmp_path / "other")}}
    assert zygote.run(tmp_path / "straight", runs.words(tmp_path / "straight", *typed), **quiet)["code"] == 0
    moment = {"log": str(log), "phase": "stepping", "visit": 2, "after": 0.05, "number": signal.SIGTERM, "in_rank": 1}
    words = runs.words(tmp_path / "run", *typed)
    assert zygote.run(tmp_path / "run", words, ranks=moment)["code"] == EXIT_STOPPED
    assert {line["made"] for line in told(log) if "code" in line} == {1}
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000001"]
    assert zygote.run(tmp_path / "run", words, **quiet)["code"] == 0
    assert runs.outcome(tmp_path / "run") == runs.outcome(tmp_path / "straight")


def test_the_last_evaluation_is_not_lost(straight: Path, tmp_path: Path, one_thread: None) -> None:
    config = composed(f"output_dir={tmp_path}")
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, "sftx.training.measure.evaluate", "token_losses", 14, signal.SIGTERM)  # four batches each time
        with pytest.raises(StoppedError, match=r"stopped after step 6 of 6"):
            run([config])
    assert not (tmp_path / "final").exists()
    run([config])
    assert_same_run(straight, tmp_path)
    results = [json.loads((f / "manifest.json").read_text())["result"] for f in (straight, tmp_path)]
    assert results[0] == results[1]


def test_a_signal_in_a_save_changes_nothing_of_it(straight: Path, tmp_path: Path, one_thread: None) -> None:
    config = composed("save_steps=3", f"output_dir={tmp_path}")
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, "sftx.training.saving.checkpoint", "write_folder", 1, signal.SIGTERM)
        with pytest.raises(StoppedError, match=r"stopped after step [34] of 6"):
            run([config])
    run([config])
    assert_same_run(straight, tmp_path)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("sftx.data.corpus", "find_sources"),
        ("sftx.data.store.tokenise", "encode_chunk"),
        ("sftx.training.opening", "load_base"),
    ],
    ids=["reading", "tokenising", "loading"],
)
def test_before_the_first_step_a_run_ends_at_once_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str
) -> None:
    monkeypatch.setenv("SFTX_CACHE", str(tmp_path / "cache"))
    config = composed(f"output_dir={tmp_path / 'run'}")
    interrupt(monkeypatch, module, name, 1, signal.SIGTERM, signal.SIGTERM)
    with pytest.raises(StoppedError, match="SIGTERM: stopped before the first step; there was nothing to save"):
        run([config])
    assert not (tmp_path / "run").exists()
    assert not [p for p in (tmp_path / "cache").rglob(".*") if not p.name.endswith(".lock")], "nothing half-written"


def test_handlers_are_given_back() -> None:
    before = [signal.getsignal(n) for n in STOP_SIGNALS]
    with Signals():
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(n) for n in STOP_SIGNALS] == before


def test_one_signal_is_heard_once_by_blocks_inside_each_other() -> None:
    """The program's own block, outside, says nothing of what the run inside it has seen to, and hears no more."""
    before = [signal.getsignal(n) for n in STOP_SIGNALS]

    def run_ends() -> None:
        with Signals() as inner:
            inner.raise_immediately = False
            os.kill(os.getpid(), signal.SIGTERM)
            raise RuntimeError("the run")

    def program_ends() -> None:
        with Signals(whole_program=True):
            with pytest.raises(StoppedError, match="SIGTERM: stopped without a checkpoint"):
                run_ends()
            os.kill(os.getpid(), signal.SIGTERM)
            raise RuntimeError("the disk")

    try:
        with pytest.raises(RuntimeError, match="the disk"):
            program_ends()
        os.kill(os.getpid(), signal.SIGTERM)
        assert {signal.getsignal(n) for n in STOP_SIGNALS} == {signal.SIG_IGN}, "until the process is gone"
    finally:
        for number, handler in zip(STOP_SIGNALS, before, strict=True):
            signal.signal(number, handler)


def test_a_signal_whose_exception_was_lost_is_heard_by_the_block_inside() -> None:
    """As where Python calls a destructor: what is raised there goes nowhere."""
    reached = []

    def program() -> None:
        with Signals():
            with suppress(EndNow):
                os.kill(os.getpid(), signal.SIGUSR1)
            with Signals():
                reached.append("the run")

    with pytest.raises(StoppedError, match="SIGUSR1: stopped before the first step"):
        program()
    assert not reached


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_signals_until_the_process_is_gone_change_nothing(tmp_path: Path, ranks: int) -> None:
    argv = words("max_steps=5000", f"output_dir={tmp_path / 'run'}")
    process = started([*argv, "parallel=ddp", f"parallel.num_processes={ranks}"], tmp_path / "run" / "metrics.jsonl")
    for number in itertools.cycle(STOP_SIGNALS):
        if process.poll() is not None:
            break
        process.send_signal(number)
        time.sleep(0.005)
    _, said = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED, said
    assert "SIGTERM: stopped after step" in said
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.5, 1.0, 2.0])
def test_a_signal_while_the_program_starts(tmp_path: Path, seconds: float) -> None:
    process = subprocess.Popen(
        [sys.executable, "train.py", *words(f"output_dir={tmp_path / 'run'}")], cwd=ROOT, stderr=subprocess.PIPE
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGUSR2)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said.decode()) == (
        EXIT_STOPPED, "sftx: SIGUSR2: stopped before the first step; there was nothing to save.\n",
    )  # fmt: skip
    assert not (tmp_path / "run").exists()


def started(argv: list[str], metrics: Path, launcher: tuple[str, ...] = (sys.executable,)) -> subprocess.Popen[str]:
    """Start a run in a session of its own, and return when it has made a few steps."""
    process = subprocess.Popen(
        [*launcher, "train.py", *argv], cwd=ROOT, text=True, start_new_session=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    until = time.monotonic() + 120
    while time.monotonic() < until and not (metrics.is_file() and metrics.read_text().count("train/loss") > 2):
        time.sleep(0.1)
    return process


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_signal_to_the_whole_group_ends_it_in_order(tmp_path: Path, workers: int) -> None:
    """As a terminal or a scheduler sends it: to the trainer and to its loaders; no process is left."""
    out = f"output_dir={tmp_path / 'run'}"
    argv = words("max_steps=5000", f"dataloader_num_workers={workers}", out)
    process = started(argv, tmp_path / "run" / "metrics.jsonl")
    os.killpg(process.pid, signal.SIGTERM)
    time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED, said
    assert "SIGTERM: stopped after step" in said
    assert "Traceback" not in said
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_a_second_run_in_a_folder_is_refused_while_the_first_is_there(tmp_path: Path) -> None:
    config = composed(f"output_dir={tmp_path}")
    code = (
        "import sys; from pathlib import Path; from sftx.training.saving.run_folder import RunFolder; "
        "folder = RunFolder(Path(sys.argv[1])); folder.lock(); print(1, flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None
    other.stdout.readline()
    with pytest.raises(RunFolderError, match=rf"another run is writing there \(process {other.pid} on "):
        run([config])
    assert {p.name for p in tmp_path.iterdir()} == {".lock"}
    other.kill()
    other.wait()
    run([config])
    assert (tmp_path / "final").is_dir()


def test_only_what_a_killed_run_left_half_written_is_swept(tmp_path: Path) -> None:
    """A file of the user's own stays, whatever it is called."""
    config = composed(f"output_dir={tmp_path}", "max_steps=1")
    run([config])
    mine = [tmp_path / ".env.database", tmp_path / ".pre-commit-config.yaml", tmp_path / "checkpoints" / ".a.b"]
    for path in mine:
        path.write_text("mine")
    code = (
        "import os, sys; from pathlib import Path; from sftx.files import write_chunks, write_folder\n"
        "def pieces(): yield b'half'; os._exit(9)\n"
        "if sys.argv[2] == 'file': write_chunks(Path(sys.argv[1]) / 'config.yaml', pieces())\n"
        "write_folder(Path(sys.argv[1]) / 'checkpoints' / 'step-000009', lambda into: os._exit(9))"
    )
    for kind in ("file", "folder"):
        assert subprocess.run([sys.executable, "-c", code, str(tmp_path), kind]).returncode == 9
    left = [p for p in tmp_path.rglob(".*") if p not in mine]
    assert len(left) == 2
    run([config])
    assert not any(p.exists() for p in left)
    assert all(p.read_text() == "mine" for p in mine)


@pytest.mark.slow
def test_a_signal_ends_a_whole_sweep(tmp_path: Path) -> None:
    """Hydra itself would go on with the next trial."""
    argv = words("max_steps=5000", f"output_dir={tmp_path}", "seed=1,2,3", "hydra.sweep.dir=" + str(tmp_path))
    process = started([*argv, "-m"], tmp_path / "0" / "metrics.jsonl")
    os.killpg(process.pid, signal.SIGTERM)
    shown, said = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED, said
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == {"0"}
    assert "1 trial in" in shown


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_ranks_agree_although_one_alone_is_asked(tmp_path: Path, rank: str) -> None:
    """The checkpoint is whole, and one process goes on from it."""
    import psutil

    out = f"output_dir={tmp_path / 'run'}"
    # as many sequences a step as the run that goes on alone
    argv = words("max_steps=5000", "gradient_accumulation_steps=2", "parallel=ddp", out)
    process = started(argv, tmp_path / "run" / "metrics.jsonl", TWO_RANKS)
    family = psutil.Process(process.pid).children(recursive=True)
    (one,) = [p for p in family if p.environ().get("RANK") == rank and p.ppid() == process.pid]
    one.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=60)
    assert "stopped after step" in said, said
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["status"] == "stopped"
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    step = int(saved.name.partition("-")[2])
    run([composed(f"max_steps={step + 1}", "parallel=single", out)])
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "completed"


RANK = """
import os, signal, threading, time
from sftx.errors import StoppedError
from sftx.signals import Signals, disregard, unblocked, blocked

with blocked():  # as a rank is started
    disregard()
    try:
        with Signals(), unblocked():
            threading.Thread(target=threading.Event().wait, daemon=True).start()  # a run leaves some: they put off none
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(10)
    except StoppedError as error:
        print(error)
    os.kill(os.getpid(), signal.SIGUSR2)
    time.sleep(0.1)
    print("it reports")
"""


def test_a_second_signal_does_not_cut_off_what_a_rank_has_to_say() -> None:
    done = subprocess.run([sys.executable, "-c", RANK], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.splitlines()[1:]) == (0, ["it reports"]), done
    assert done.stdout.startswith("SIGUSR1: stopped before the first step")
