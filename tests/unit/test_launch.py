"""How many processes a run has, and what is said of numbers that cannot be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sftx.config.checks.check import config_from
from sftx.config.composition.prepare import prepare
from sftx.config.untrusted.allowlist import unlisted
from sftx.errors import ConfigError, RankError
from sftx.parallel import supervisor
from sftx.run import run
from sftx.runs import launch, rank
from sftx.training.saving.run_folder import RunFolder


@pytest.fixture(autouse=True)
def _nobody_started_this(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("words", "gpus", "count"),
    [
        (["parallel=single"], 4, 1),
        (["parallel=ddp"], 0, 1),
        (["parallel=ddp"], 4, 4),
        (["parallel=ddp", "device=cpu"], 4, 1),
        (["parallel=ddp", "parallel.num_processes=2"], 4, 2),
        (["parallel=zero3"], 8, 8),
        (["parallel=zero3", "parallel.num_processes=1"], 8, 1),
    ],
)
def test_how_many(make_config, monkeypatch, words: list[str], gpus: int, count: int) -> None:
    monkeypatch.setattr(launch, "_count_gpus", lambda: gpus)
    config = make_config(*words)
    assert launch.count_ranks(config) == count
    monkeypatch.setenv("RANK", "0")
    assert launch.count_ranks(config) == 1, "a launcher has started them"


def test_gpus_are_counted_without_torch_in_this_process() -> None:
    assert launch._count_gpus() == torch.cuda.device_count()


@pytest.mark.parametrize(
    ("words", "environment", "said"),
    [
        (
            ["parallel.num_processes=0"],
            {},
            r"`parallel.num_processes`: expected null or an integer >= 1 and <= 1024, got 0",
        ),
        (
            ["parallel.hang_seconds=-1"],
            {},
            r"`parallel.hang_seconds`: expected null or an integer >= 1 and <= 31536000, got -1",
        ),
        (
            ["parallel.timeout_seconds=0"],
            {},
            r"`parallel.timeout_seconds`: expected an integer >= 1 and <= 31536000, got 0",
        ),
        (["parallel.num_processes=two"], {}, r"expected null or an integer >= 1 and <= 1024, got 'two'"),
        (["parallel.num_process=2"], {}, r"Did you mean `num_processes`"),
        (["parallel.num_processes=4"], {"RANK": "0", "WORLD_SIZE": "2"}, r"has started 2 processes: leave it out"),
    ],
)
def test_numbers_that_cannot_be(monkeypatch, words: list[str], environment: dict[str, str], said: str) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=said):
        prepare(["parallel=ddp", *words])


def test_a_launcher_may_start_as_many_as_are_asked_for(monkeypatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert prepare(["parallel=ddp", "parallel.num_processes=2"]).shown is None


def test_a_program_of_ones_own_is_told_that_it_is_alone(make_config) -> None:
    with pytest.raises(ConfigError, match=r"num_processes=2`: this process trains alone"):
        run([make_config("parallel=ddp", "parallel.num_processes=2")])


def test_one_process_needs_no_others(make_config) -> None:
    result = run([make_config("parallel=ddp", "max_steps=1")])[0]
    assert result.steps == 1


def test_cores_are_shared_out_and_it_is_said(monkeypatch) -> None:
    monkeypatch.setattr(launch.os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert launch._share_cores(3) == [
        "each of the 3 processes computes with 2 of 8 cores; OMP_NUM_THREADS sets another number"
    ]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert launch._share_cores(3) == []


def test_a_rank_asks_again_what_may_run(make_config, monkeypatch, tmp_path: Path) -> None:
    """Whatever becomes of a configuration on its way to a rank."""
    from dataclasses import asdict

    plain = asdict(make_config())
    told = {"configs": [plain], "notes": [], "command": "", "folders": []}
    assert not unlisted(plain, [], lambda _: "config")
    assert config_from(plain) == make_config()
    plain["scheduler"] = {"_target_": "os.system", "command": f"touch {tmp_path / 'mark'}"}
    with pytest.raises(ConfigError, match=r"os\.system"):
        rank._train(told)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(("before", "after"), [("running", "failed"), ("completed", "completed")])
def test_the_end_of_a_killed_run_is_noted_once(tmp_path: Path, before: str, after: str) -> None:
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({"status": before}))
    RunFolder(tmp_path).note_end("failed", RankError("rank 1 was killed by SIGKILL"))
    assert json.loads(manifest.read_text())["status"] == after
    assert (tmp_path / "train.log").exists() == (after == "failed")
    assert not (tmp_path / ".lock").exists()
    RunFolder(tmp_path / "none").note_end("failed", RankError("x"))
    assert not (tmp_path / "none").exists()


@pytest.mark.xfail(strict=True, reason="issue 10/15: the supervisor's ranks all see every GPU")
def test_each_rank_sees_its_own_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that takes `cuda:0` then takes the rank's own, and none keeps a context on another's."""
    environments: list[Mapping[str, str]] = []

    def started(number: int, count: int, order: object, environment: Mapping[str, str], *_: object) -> SimpleNamespace:
        environments.append(environment)
        nothing = {name: lambda *_: None for name in ("kill", "reap", "close", "read")}
        return SimpleNamespace(number=number, runs=False, told={}, ended=0, finished=True, **nothing)

    monkeypatch.setattr(supervisor, "RankProcess", started)
    supervisor.Supervisor(2, module="sftx.runs.rank", hang_seconds=None, timeout_seconds=60).supervise(
        {}, {"CUDA_VISIBLE_DEVICES": "2,3"}
    )
    assert [one["LOCAL_RANK"] for one in environments] == ["0", "1"]
    assert [one["CUDA_VISIBLE_DEVICES"] for one in environments] == ["2", "3"]


class _MustNotStart:
    def __init__(self, *_: object, **__: object) -> None:
        pytest.fail("a process was started")


@pytest.mark.xfail(strict=True, reason="issue 10/15: each rank finds out by itself, after all have started")
def test_more_processes_than_gpus_are_refused_before_any_starts(make_config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_count_gpus", lambda: 2)
    monkeypatch.setattr(launch, "Supervisor", _MustNotStart)
    with pytest.raises(ConfigError, match=r"num_processes.*4.*2 GPUs"):
        launch.launch([make_config("parallel=ddp", "parallel.num_processes=4")], [], "")
