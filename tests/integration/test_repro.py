"""`sftx repro`: a run again from its folder, which may be untrusted."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.conftest import ROOT, SMALL, over

from sftx import cli
from sftx.errors import ConfigError, RunFolderError, StoppedError

QUICK = over(SMALL, "max_steps=3", "max_train_rows=24")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run on data of its own, started in that data's folder."""
    from sftx.config.checks.check import freeze
    from sftx.config.composition.prepare import compose_checked
    from sftx.run import run

    home = tmp_path_factory.mktemp("home")
    (home / "mine").mkdir()
    shutil.copy(ROOT / "data/aspcoder_train.csv", home / "mine/rows.csv")
    words = over(QUICK, "train_file_path=mine", "train_file_name=rows.csv", "output_dir=run", "lora_dropout=0.1")
    before = Path.cwd()
    os.chdir(home)
    try:
        run([freeze(compose_checked(words))])
    finally:
        os.chdir(before)
    return home / "run"


@pytest.fixture
def past(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of that run, and stand where it was started."""
    monkeypatch.chdir(made.parent)
    return Path(shutil.copytree(made, tmp_path / "run"))


@pytest.fixture
def not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail when a run is started."""
    import sftx.run

    monkeypatch.setattr(sftx.run, "run", lambda *_, **__: pytest.fail("a run was started"))


def edit(folder: Path, change: Callable[[dict[str, Any]], Any], file: str = "config.yaml") -> None:
    path = folder / file
    tree = yaml.safe_load(path.read_text()) if file == "config.yaml" else json.loads(path.read_text())
    change(tree)
    path.write_text(yaml.safe_dump(tree) if file == "config.yaml" else json.dumps(tree))


def repro(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str]:
    capsys.readouterr()
    code = cli.run(["repro", *map(str, words)])
    return code, capsys.readouterr().out


def refused(*words: Any) -> str:
    with pytest.raises((ConfigError, RunFolderError)) as raised:
        cli.run(["repro", *map(str, words)])
    return str(raised.value)


def content(folder: Path) -> dict[str, str]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


# The same bits


def test_a_run_comes_to_the_same_bits_beside_the_old_one(past: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = content(past)
    code, out = repro(capsys, past)
    again = past.with_name("run-repro")
    assert code == 0, out
    assert "then and now: no difference" in out
    assert "Same bits: " in out
    assert "and the weights in final/." in out
    assert content(past) == before, "nothing of the old run is touched"
    assert json.loads((again / "manifest.json").read_text())["command"] == f"sftx repro {past}"
    assert cli.run(["diff", str(past), str(again)]) == 0
    code, out = repro(capsys, past, "--check")
    assert code == 0
    assert out.startswith(f"repro  {past}  (completed, 3 steps, started {_started(past)})\n")
    assert "then and now: no difference" in out
    assert "is the run itself" in refused(past, "--output_dir", past)
    assert f"holds a run already; name a new folder. To compare: sftx diff {past} {again}" in refused(
        past, "--output_dir", again
    )


def _started(folder: Path) -> str:
    started: str = json.loads((folder / "manifest.json").read_text())["environment"]["started"]
    return started[:19].replace("T", " ")


def test_other_bits_are_said_where_they_begin(past: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The old run's record is changed in the last digit of one number, and its weights in one bit."""
    lines = [json.loads(line) for line in (past / "metrics.jsonl").read_text().splitlines()]
    changed = next(r for r in lines if r["step"] == 2 and "train/grad_norm" in r)
    changed["train/grad_norm"] *= 1 + 2**-51
    (past / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    weights = past / "final/adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    (past.with_name("run-repro")).mkdir()  # taken, by something else
    code, out = repro(capsys, past)
    assert code == 1
    assert "Not the same bits: train/grad_norm differs first, at step 2:" in out
    assert "final/adapter_model.safetensors: sha256 " in out
    assert (past.with_name("run-repro-2") / "final").is_dir()


def test_a_stopped_run_is_compared_as_far_as_it_came(past: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(past, lambda m: m.update(status="stopped"), "manifest.json")
    lines = (past / "metrics.jsonl").read_text().splitlines(keepends=True)
    (past / "metrics.jsonl").write_text("".join(lines[:2]))
    shutil.rmtree(past / "final")
    code, out = repro(capsys, past)
    assert code == 0, out
    assert "the run is stopped: its last recorded step is 1" in out
    assert f"Same bits as far as {past} came: " in out
    assert "weights: not compared" in out


def test_a_run_that_was_prolonged_is_one_run(
    past: Path, make_config: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was also evaluated where it ended first; its config.yaml holds the last length."""
    from sftx.run import run

    monkeypatch.chdir(ROOT)
    folder = past.with_name("long")
    for steps in (2, 4):
        run(
            [
                make_config(
                    *over(QUICK, f"max_steps={steps}", "save_strategy=steps", f"output_dir={folder}"), small=False
                )
            ]
        )
    code, out = repro(capsys, folder)
    assert code == 0, out
    assert "Same bits: " in out
    assert f"{folder} has more records of " in out


def test_a_stopped_repetition_is_gone_on_with(
    past: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sftx.training.loop as loop

    recorded = loop._record

    def stop_after_one(session: Any, trial: Any) -> None:
        recorded(session, trial)
        if trial.step == 1:
            session.signals.received = "SIGTERM"

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_record", stop_after_one)
        with pytest.raises(StoppedError):
            cli.run(["repro", str(past)])
    code, out = repro(capsys, past)
    assert code == 0, out
    again = past.with_name("run-repro")
    assert f"resumed from {again / 'checkpoints/step-000001'} (step 1 of 3)" in out
    assert not past.with_name("run-repro-2").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["data.streaming=true", "eval_file_name=aspcoder_eval.csv", "dataloader_num_workers=2"],
        ["train_file_name=[aspcoder_train.csv,aspcoder_eval.csv]", "data.duplicates=drop_exact", "batching=packed"],
        ["mode=full", "callback=[early_stopping]", "keep_best=true", "save_strategy=steps", "eval_steps=1", "save_steps=1"],
        ["adapter", "scheduler=cosine", "optimizer=lion"],
    ],
    ids=["streamed", "several files", "full", "adapter"],
)  # fmt: skip
def test_runs_of_all_kinds_come_to_the_same_bits(
    past: Path, make_config: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    """And each says what differs when its data, or what it started from, is another."""
    from sftx.run import run

    monkeypatch.chdir(ROOT)
    words = [f"adapter={past / 'final'}" if w == "adapter" else w for w in words]
    config = make_config(*over(QUICK, *words, f"output_dir={past.with_name('kind')}"), small=False)
    run([config])
    code, out = repro(capsys, config.output_dir)
    assert code == 0, out
    assert "then and now: no difference" in out
    assert "and the weights in final/." in out
    monkeypatch.chdir(past.parent)
    (past.parent / "data").mkdir()
    for name in ("aspcoder_train.csv", "aspcoder_eval.csv"):
        text = (ROOT / "data" / name).read_text()
        (past.parent / "data" / name).write_text(text + ("html,a,b\n" if name == "aspcoder_eval.csv" else ""))
    code, out = repro(capsys, config.output_dir, f"train_file_path={past.parent / 'data'}", "--check")
    assert code == int("aspcoder_eval.csv" in str(words))
    assert (f"corpus: {past.parent / 'data/aspcoder_eval.csv'}:" in out) == bool(code)
    (past / "final/adapter_model.safetensors").write_bytes(b"other")
    if config.adapter:
        assert repro(capsys, config.output_dir, "--check")[0] == 1


# What is said before


@pytest.mark.usefixtures("not_started")
def test_every_difference_of_machine_and_code_is_said(past: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def other(m: dict[str, Any]) -> None:
        environment = m["environment"]
        environment["python"] = "3.10.1"
        environment["packages"]["torch"] = "2.9.0"
        environment["git"] = {"commit": "c" * 40, "dirty": True, "diff": "one\ntwo\n"}
        environment["hardware"] |= {"torch_threads": 64, "gpus": ["H100"]}

    edit(past, other, "manifest.json")
    code, out = repro(capsys, past, "--check")
    assert code == 1
    for line in (
        "  python: 3.10.1 -> ", "  packages.torch: 2.9.0 -> ", '  hardware.gpus: ["H100"] -> ',
        "  hardware.torch_threads: 64 -> ", "  git.commit:", "  git.diff: ",
    ):  # fmt: skip
        assert line in out
    words = " ".join(out.split())
    assert f"git checkout {'c' * 40}" in words
    assert f"OMP_NUM_THREADS=64 sftx repro {past}" in words
    assert f"stored in {past}/manifest.json as environment.git.diff; today's checkout has" in words
    assert not past.with_name("run-repro").exists()


@pytest.mark.usefixtures("not_started")
def test_changes_that_are_still_there_are_no_difference(
    past: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sftx.runs import manifest

    state = {"commit": "c" * 40, "dirty": True, "diff": "one\ntwo\n"}
    edit(past, lambda m: m["environment"].update(git=state), "manifest.json")
    monkeypatch.setattr(manifest, "git_state", lambda: state)
    code, out = repro(capsys, past, "--check")
    assert code == 0, out
    assert "today's checkout has the same such changes" in " ".join(out.split())


@pytest.mark.usefixtures("not_started")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda home, past: (home / "mine/rows.csv").open("a").write("a,b,c\n"), "mine/rows.csv: sha256 "),
        (lambda home, past: (home / "mine/rows.csv").unlink(), "missing: train_file_name=rows.csv: no such file in"),
        (lambda home, past: edit(past, lambda c: c.update(learning_rate=0.5)), "config.yaml, edited since: learning_rate: 0.001 -> 0.5"),
        (lambda home, past: edit(past, lambda c: c.update(adapter="gone")), "missing: adapter=gone"),
        (lambda home, past: edit(past, lambda c: c.update(model_name_or_path="./gone")), "missing: model_name_or_path=./gone"),
        (lambda home, past: edit(past, lambda m: m["identity"].update(model="0" * 16), "manifest.json"), "model qwen-tiny: fingerprint 0000000000000000 -> "),
        (lambda home, past: edit(past, lambda c: c["data"].update(system="*** it")), "config.yaml: data.system: a secret -> *** in its place"),
    ],
    ids=["changed rows", "missing file", "edited config", "no adapter", "no model", "another model", "masked"],
)  # fmt: skip
def test_another_run_is_not_started(
    past: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: Any, said: str
) -> None:  # fmt: skip
    home = tmp_path / "home"
    shutil.copytree(Path.cwd() / "mine", home / "mine")
    edit(past, lambda m: m.update(directory=str(home)), "manifest.json")
    monkeypatch.chdir(home)
    assert repro(capsys, past, "--check")[0] == 0
    change(home, past)
    code, out = repro(capsys, past)
    assert code == 1
    assert said in " ".join(out.split())
    assert "Not started: " in out
    assert repro(capsys, past, "--check")[0] == 1


def test_another_run_is_started_anyway(past: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(past, lambda c: c.update(seed=7))
    code, out = repro(capsys, past, "--anyway", "--output_dir", past.with_name("else"))
    assert code == 1
    assert "Not the same bits: " in out
    assert (past.with_name("else") / "final").is_dir()


# Where it lies


def test_relative_paths_lead_from_where_it_was_started(
    past: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home = Path.cwd()
    monkeypatch.chdir(tmp_path)
    code, out = repro(capsys, past)
    assert code == 0, out
    assert f"relative paths: from {home}, where the run was started" in out
    assert yaml.safe_load((tmp_path / "run-repro/config.yaml").read_text())["train_file_path"] == str(home / "mine")
    assert cli.run(["diff", str(past), str(tmp_path / "run-repro")]) == 0, "the same place"


@pytest.mark.usefixtures("not_started")
def test_a_run_from_another_machine_finds_its_data_here_or_where_it_is_typed(
    past: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home = Path.cwd()
    edit(past, lambda m: m.update(directory="/nowhere/at/all"), "manifest.json")
    assert repro(capsys, past, "--check")[0] == 0
    monkeypatch.chdir(tmp_path)
    code, out = repro(capsys, past, "--check")
    assert code == 1
    words = " ".join(out.split())
    assert "missing: train_file_path=mine: there is no such folder" in words
    assert "Looked for from /nowhere/at/all, where the run was started, and from here." in words
    assert repro(capsys, past, f"train_file_path={home / 'mine'}", "--check")[0] == 0


# An untrusted folder

TRAP = """from pathlib import Path
Path({mark!r}).write_text("ran")
from sftx.training.schedulers import Constant


class Trap(Constant):
    pass
"""


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a module on the path that leaves a mark when it is imported; return the mark."""
    mark = tmp_path / "MARK"
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/trap_parts.py").write_text(TRAP.format(mark=str(mark)))
    monkeypatch.syspath_prepend(str(tmp_path / "parts"))
    yield mark
    sys.modules.pop("trap_parts", None)


STRANGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a component": lambda c: c["scheduler"].update(_target_="trap_parts.Trap"),
    "below a component": lambda c: c["data"].update(columns={"human": {"_target_": "trap_parts.Trap"}}),
    "a callback": lambda c: c["callback"].update(x={"_target_": "trap_parts.Trap"}),
    "a tracker": lambda c: c["tracker"].update(x={"_target_": "os.system", "command": "true"}),
    "allowed by the file": lambda c: (c.update(allow_targets=["trap_parts.*"]), c["scheduler"].update(_target_="trap_parts.Trap")),
    "trusting the model": lambda c: c.update(trust_remote_code=True),
    "trusting below": lambda c: c["data"].update(columns={"trust_remote_code": "human"}),
    "an interpolation": lambda c: c["data"].update(system="${oc.env:HOME}"),
    "a made interpolation": lambda c: c.update(scheduler="${oc.create:'{_target_: trap_parts.Trap}'}"),
    "a hydra key": lambda c: c.update(hydra={"run": {"dir": "/tmp/x"}}),
    "an unknown key": lambda c: c.update(lerning_rate=1),
    "a wrong type": lambda c: c.update(seed="x"),
    "a missing key": lambda c: c.pop("seed"),
    "its data is none": lambda c: c.update(data=None),
}  # fmt: skip


@pytest.mark.usefixtures("not_started")
@pytest.mark.parametrize("name", STRANGE)
@pytest.mark.parametrize("option", [[], ["--anyway"], ["--check"]], ids=str)
def test_a_doctored_config_is_refused_and_leaves_nothing(past: Path, trap: Path, name: str, option: list[str]) -> None:
    edit(past, STRANGE[name])
    before = content(past.parent)
    message = refused(past, *option)
    assert "config.yaml" in message
    assert not trap.exists()
    assert "trap_parts" not in sys.modules
    assert content(past.parent) == before


def test_what_a_file_cannot_give_is_typed_again(past: Path, trap: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(past, lambda c: (c.update(allow_targets=["trap_parts.*"]), c.update(scheduler={"_target_": "trap_parts.Trap"}, lr_scheduler_type="constant")))  # fmt: skip
    message = refused(past)
    assert f"sftx repro {past} 'allow_targets=[trap_parts.*]'" in message
    assert "`scheduler._target_=trap_parts.Trap`" in message, "what the file allows itself is not allowed"
    edit(past, lambda c: c.update(allow_targets=[]))
    assert "allow_targets=[trap_parts.*]" in refused(past)
    with pytest.raises(ConfigError, match="trap_parts"):
        cli.run(["repro", str(past), "allow_targets=[other.*]"])
    assert not trap.exists()
    code, _ = repro(capsys, past, "allow_targets=[trap_parts.*]", "--anyway")
    assert code == 0, "a constant rate is one without warm-up"
    assert trap.exists()
    assert "trap_parts.Trap" in (past.with_name("run-repro") / "config.yaml").read_text()


def test_a_package_that_none_should_allow_is_not_proposed(past: Path) -> None:
    edit(past, lambda c: c.update(allow_targets=["os.*"]))
    message = refused(past)
    assert "Do not run a configuration that names it." in message
    assert "type it again" not in message


@pytest.mark.usefixtures("not_started")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["learning_rate=1"], "`learning_rate`: a run is repeated as it was; this is not to be changed."),
        (["output_dir=x"], "where to train is given by --output_dir x"),
        (["train_file_pth=x"], "Did you mean `train_file_path`?"),
        (["rubbish"], "'rubbish': expected key=value"),
        (["~adapter"], "'~adapter': expected key=value"),
        (["train_file_path=a,b"], "expected key=value"),
        (["trust_remote_code=true"], "`trust_remote_code=true`: the run had false"),
        (["allow_targets=[*]"], "allow_targets"),
    ],
)
def test_what_is_typed_and_cannot_be(past: Path, words: list[str], said: str) -> None:
    assert said in refused(past, *words)


@pytest.mark.usefixtures("not_started")
def test_what_was_masked_can_be_typed(
    past: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(past, lambda c: c["data"].update(system="***"))
    edit(past, lambda m: m["identity"]["config"]["data"].update(system="***"), "manifest.json")
    code, out = repro(capsys, past, "--check")
    assert code == 1
    assert "config.yaml: data.system: a secret -> *** in its place: type it again, as key=value" in out
    assert repro(capsys, past, "data.system=hello", "--check")[0] == 0
    monkeypatch.setenv("MY_SECRET", "open sesame")
    code, out = repro(capsys, past, "data.system=${oc.env:MY_SECRET}", "--check")
    assert code == 0, out
    edit(past, lambda c: c["data"].update(category_prefix={"a.b": "***", "c": "***"}))
    assert "`data.category_prefix.a.b`: cannot be typed" in refused(past, "data.category_prefix.a.b=x")


@pytest.mark.usefixtures("not_started")
def test_a_damaged_manifest_is_one_message(past: Path) -> None:
    (past / "manifest.json").write_text('{"status": ')
    message = refused(past)
    assert message.startswith(f"{past}/manifest.json: cannot be read")
    assert message.endswith("Without it the run cannot be repeated.")


# Several processes


@pytest.mark.usefixtures("not_started")
def test_as_many_processes_as_it_was_made_by(
    past: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(past, lambda m: m.update(ranks=2), "manifest.json")
    assert f"made by 2 processes, here are 1. Type: torchrun --nproc_per_node 2 -m sftx repro {past}" in refused(past)
    code, out = repro(capsys, past, "--check")
    assert code == 1, "its sequences a step no longer fit its config"
    assert f"made by 2 processes: torchrun --nproc_per_node 2 -m sftx repro {past}" in " ".join(out.split())
    edit(past, lambda m: m.update(ranks=1), "manifest.json")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert f"made by one process, here are 2. Type: sftx repro {past}" in refused(past)


def sftx(*words: Any, launcher: tuple[str, ...] = (), cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [*(launcher or (sys.executable,)), "-m", "sftx", *map(str, words)]
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_two_processes_come_to_the_same_bits(cli: Any, tmp_path: Path) -> None:
    from tests.conftest import TWO_RANKS

    run = tmp_path / "run"
    assert cli(*QUICK, "parallel=ddp", f"output_dir={run}", launcher=TWO_RANKS).returncode == 0
    done = sftx("repro", run, launcher=TWO_RANKS)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("Same bits: ") == 1
    assert done.stdout.count("then and now: ") == 1


@pytest.mark.slow
def test_processes_that_the_run_started_are_started_again(
    cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    run = tmp_path / "run"
    assert cli(*QUICK, "parallel=ddp", "parallel.num_processes=2", f"output_dir={run}").returncode == 0
    done = sftx("repro", run)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "then and now: no difference" in done.stdout
    assert "Same bits: " in done.stdout
    assert json.loads((tmp_path / "run-repro" / "manifest.json").read_text())["ranks"] == 2


@pytest.mark.slow
def test_the_command_line_end_to_end(cli: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = cli(*QUICK, "lora_dropout=0.2", "dataloader_num_workers=2", "mode=qlora", f"output_dir={run}")
    assert done.returncode == 0, done.stderr[-2000:]
    done = sftx("repro", run, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Same bits: " in done.stdout
    done = sftx("diff", run, tmp_path / "run-repro", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["differs"] is False
    done = sftx("diff", run, tmp_path / "rum")
    assert done.returncode == 2
    assert "Did you mean" in done.stderr


@pytest.mark.parametrize(
    ("device", "deterministic", "said"),
    [
        ("cpu", False, "expected to be bitwise equal on a CPU"),
        ("cuda", True, "expected to be bitwise equal on the same GPU model and versions (deterministic=true)"),
        ("cuda", False, "expected to be equal but for rounding: on a GPU without deterministic=true"),
    ],
)
def test_what_can_be_expected_is_said(
    past: Path, capsys: pytest.CaptureFixture[str], device: str, deterministic: bool, said: str
) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["effective"]["settings"] |= {"device": device, "deterministic": deterministic}

    edit(past, change, "manifest.json")
    _, out = repro(capsys, past, "--check")
    assert said in " ".join(out.split())
