"""An untrusted configuration cannot run code: each of these is refused before a marker file could appear."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftx.build import build
from sftx.config.checks.check import freeze
from sftx.config.checks.signature import defined_as, find
from sftx.config.composition.prepare import compose_checked, prepare
from sftx.config.options import component_of, options
from sftx.config.schema import COMPONENTS, GROUPS
from sftx.config.untrusted import allowlist
from sftx.config.untrusted.file_keys import package_problem
from sftx.errors import ConfigError

ROOT = Path(__file__).parents[2]
BAIT = """from pathlib import Path
import os
import logging
Path({mark!r}).write_text("imported")
try:
    from hydra.experimental.callback import Callback
except ImportError:
    Callback = object


class Spy(Callback):
    def __init__(self, **settings):
        Path({mark!r}).write_text("made")


class Handler(logging.Handler):
    def __init__(self, **settings):
        super().__init__()
        Path({mark!r}).write_text("made")
"""
PRIMARY = (ROOT / "conf/train.yaml").read_text().replace("\nhydra:", "\n\nhydra:")

# name -> (files in a --config-dir folder, command line); MARK is the marker's path, FOLDER the folder's.
OVERLAYS = {
    "a target of os": "scheduler: {_target_: os.system, command: touch MARK}",
    "subprocess": "optimizer: {_target_: subprocess.run, args: [touch, MARK]}",
    "builtins.exec": "mode: {_target_: builtins.exec, _args_: ['open(\"MARK\", \"w\")']}",
    "builtins.eval": "data: {_target_: builtins.eval, _args_: ['open(\"MARK\", \"w\")']}",
    "builtins.open": "model: {_target_: builtins.open, file: MARK, mode: w}",
    "__import__": "precision: {_target_: builtins.__import__, name: bait}",
    "import_module": "parallel: {_target_: importlib.import_module, name: bait}",
    "runpy": "scheduler: {_target_: runpy.run_module, mod_name: bait}",
    "pickle": "scheduler: {_target_: pickle.loads, data: 'x'}",
    "an own package": "scheduler: {_target_: bait.Spy}",
    "an alias in logging": "scheduler: {_target_: logging.os.system, command: touch MARK}",
    "an alias in sftx": "scheduler: {_target_: sftx.files.os.system, command: touch MARK}",
    "an alias in a component's module": "scheduler: {_target_: sftx.training.schedulers.math.os.system}",
    "what a component's module imports": "callback: {x: {_target_: sftx.training.callbacks.Path}}",
    "a function of sftx": "scheduler: {_target_: sftx.files.write_text, path: MARK, text: x}",
    "sftx's own instantiate": "scheduler: {_target_: sftx.build.build, node: {_target_: bait.Spy}}",
    "a private name of a component's module": "scheduler: {_target_: sftx.runs.trackers._redacted_argv}",
    "dunder names": "scheduler: {_target_: sftx.training.schedulers.Cosine.__init__.__globals__}",
    "hydra's instantiate": "scheduler: {_target_: hydra.utils.instantiate, config: {_target_: bait.Spy}}",
    "hydra's get_method": "scheduler: {_target_: hydra.utils.get_method, path: bait.Spy}",
    "omegaconf registers a resolver": "scheduler: {_target_: omegaconf.OmegaConf.register_new_resolver, name: x}",
    "functools.partial": "scheduler: {_target_: functools.partial, _args_: [{_target_: os.system}]}",
    "_partial_": "scheduler: {_target_: os.system, _partial_: true, command: touch MARK}",
    "nested in an argument": "callback: {x: {_target_: sftx.training.callbacks.Profile, steps: {_target_: bait.Spy}}}",
    "nested in a list": "callback: {x: {_target_: sftx.training.callbacks.GenerateSamples, prompts: [{_target_: bait.Spy}]}}",
    "deep in a mapping": "data: {columns: {human: {x: [[{_target_: bait.Spy}]]}}}",
    "in a knob": "adapter: {_target_: bait.Spy}",
    "a target that is put together": "scheduler: {_target_: '${template_name}.system'}\ntemplate_name: os",
    "a target from the environment": "scheduler: {_target_: '${oc.env:HOME,os.system}'}",
    "a target in a list": "scheduler: {_target_: [os.system]}",
    "oc.create": "data: {columns: '${oc.create:\"{_target_: bait.Spy}\"}'}",
    "oc.decode": "data: {columns: '${oc.decode:\"{_target_: bait.Spy}\"}'}",
    "a resolver by a name that is put together": "template_name: oc.create\ndata: {columns: '${${template_name}:\"{_target_: bait.Spy}\"}'}",
    "a callback of Hydra": "hydra: {callbacks: {x: {_target_: bait.Spy}}}",
    "a callback that pickles": "hydra: {callbacks: {x: {_target_: hydra.experimental.callbacks.PickleJobInfoCallback}}}",
    "a callback by a dotted key": "hydra.callbacks.x._target_: bait.Spy",
    "a handler's class": "hydra: {job_logging: {version: 1, handlers: {x: {class: bait.Handler}}, root: {handlers: [x]}}}",
    "a handler's factory": "hydra: {job_logging: {version: 1, handlers: {x: {(): bait.Handler}}, root: {handlers: [x]}}}",
    "a formatter's factory": "hydra: {job_logging: {version: 1, formatters: {x: {(): os.system, command: touch MARK}}}}",
    "a filter's factory": "hydra: {hydra_logging: {version: 1, filters: {x: {(): 'ext://bait.Handler'}}}}",
    "ext in logging": "hydra: {job_logging: {version: 1, handlers: {x: {class: logging.StreamHandler, stream: 'ext://bait.Spy'}}}}",
    "cfg in logging": "hydra: {job_logging: {version: 1, handlers: {x: {class: logging.StreamHandler, stream: 'cfg://version'}}}}",
    "a log file anywhere": "hydra: {job_logging: {version: 1, handlers: {x: {class: logging.FileHandler, filename: MARK}}, root: {handlers: [x]}}}",
    "Hydra's own logging, sent elsewhere": "hydra: {hydra_logging: {version: 1, handlers: {x: {class: logging.FileHandler, filename: MARK}}, root: {handlers: [x]}}}",
    "logging over a socket": "hydra: {job_logging: {version: 1, handlers: {x: {class: logging.handlers.SocketHandler, host: h, port: 1}}}}",
    "a queue of logging": "hydra: {job_logging: {version: 1, handlers: {x: {class: logging.handlers.QueueHandler, queue: bait.Spy}}}}",
    "a job's name with a path": "hydra: {job: {name: ../../x}}",
    "a launcher": "hydra: {launcher: {_target_: bait.Spy}}",
    "a launcher by a plugin's prefix": "hydra: {launcher: {_target_: hydra_plugins.bait.Spy}}",
    "shell lines of a launcher": "hydra: {launcher: {setup: [touch MARK]}}",
    "a launcher's python": "hydra: {launcher: {python: touch MARK}}",
    "a line break for sbatch": 'hydra: {launcher: {partition: "a\\ntouch MARK"}}',
    "a sweeper": "hydra: {mode: MULTIRUN, sweeper: {_target_: bait.Spy}}",
    "a sampler of a sweeper": "hydra: {sweeper: {sampler: {_target_: bait.Spy}}}",
    "a sweeper's function": "hydra: {sweeper: {custom_search_space: bait.Spy}}",
    "a sweeper's storage": "hydra: {sweeper: {storage: {_target_: bait.Spy}}}",
    "a sweep over targets": "hydra: {mode: MULTIRUN, sweeper: {params: {scheduler._target_: 'sftx.training.schedulers.Cosine,bait.Spy'}}}",
    "a sweep over callbacks": "hydra: {mode: MULTIRUN, sweeper: {params: {+hydra.callbacks.x._target_: 'bait.Spy,bait.Spy'}}}",
    "a sweep over logging": "hydra: {mode: MULTIRUN, sweeper: {params: {hydra/job_logging: 'default,none'}}}",
    "a sweep over what is allowed": "hydra: {mode: MULTIRUN, sweeper: {params: {'+allow_targets': '[bait.*],[os.*]'}}}",
    "a search path": "hydra: {searchpath: ['pkg://bait']}",
    "overrides that Hydra repeats": "hydra: {overrides: {task: ['scheduler._target_=bait.Spy']}}",
    "environment variables": "hydra: {job: {env_set: {LD_PRELOAD: MARK}}}",
    "secrets copied": "hydra: {job: {env_copy: [HOME]}}",
    "files of Hydra's elsewhere": "hydra: {run: {dir: MARK}, output_subdir: .}",
    "it allows itself": "allow_targets: ['bait.*']\nscheduler: {_target_: bait.Spy}",
    "it allows itself, put together": "allow_targets: '${oc.dict.keys:data.columns}'\ndata: {columns: {bait.Spy: x}}",
    "it trusts a model's code": "trust_remote_code: true",
    "it trusts a model's code, put together": "trust_remote_code: ${gradient_checkpointing}",
    "a Python tag": "scheduler: !!python/object/apply:os.system ['touch MARK']",
    "an anchor": "x: &x {_target_: bait.Spy}\nscheduler: *x",
    "a merge key": "x: &x {_target_: bait.Spy}\nscheduler: {<<: *x}",
    "a default put elsewhere": "defaults: [{/scheduler@hydra.callbacks.x: cosine}]",
    "an option of Hydra's that is not there": "defaults: [{override hydra/job_logging: evil}]",
}  # fmt: skip
OTHERS: dict[str, tuple[dict[str, str], list[str]]] = {
    "a component's file": ({"scheduler/evil.yaml": "_target_: bait.Spy"}, ["scheduler=evil"]),
    "a component put into Hydra": (
        {"scheduler/evil.yaml": "# @package hydra.callbacks.x\n_target_: bait.Spy"}, ["scheduler=evil"]),
    "a component that fills Hydra's logging": (
        {"scheduler/evil.yaml": "# @package hydra.job_logging\nhandlers: {x: {(): bait.Handler}}"}, ["scheduler=evil"]),
    "a component's file that sets all": (
        {"scheduler/evil.yaml": "# @package _global_\nscheduler: {_target_: sftx.training.schedulers.Constant}\n"
         "hydra: {callbacks: {x: {_target_: bait.Spy}}}"}, ["scheduler=evil"]),
    "a component's file that allows itself": (
        {"scheduler/evil.yaml": "# @package _global_\nscheduler: {_target_: bait.Spy}\nallow_targets: [bait.*]"},
        ["scheduler=evil"]),
    "a primary configuration": (
        {"train.yaml": PRIMARY.replace("\nhydra:", "\nhydra:\n  callbacks: {x: {_target_: bait.Spy}}", 1)}, []),
    "a search path of the primary configuration": (
        {"train.yaml": PRIMARY.replace("\nhydra:", "\nhydra:\n  searchpath: ['pkg://bait']", 1)}, []),
    "a launcher's file": (
        {"hydra/launcher/evil.yaml": "hydra: {launcher: {_target_: bait.Spy}}"}, ["hydra/launcher=evil"]),
    "a logging file": (
        {"hydra/job_logging/evil.yaml": "hydra: {job_logging: {handlers: {x: {(): bait.Handler}}}}"},
        ["hydra/job_logging=evil"]),
    "callbacks' file": (
        {"hydra/callbacks/evil.yaml": "hydra: {callbacks: {x: {_target_: bait.Spy}}}"}, ["hydra/callbacks=evil"]),
    "a debug mode": ({"debug/evil.yaml": "hydra: {callbacks: {x: {_target_: bait.Spy}}}"}, ["debug=evil"]),
    "a sweep's file": ({"sweep/evil.yaml": "hydra: {launcher: {_target_: bait.Spy}}"}, ["sweep=evil"]),
    "the second point of a sweep": (
        {"experiment/evil.yaml": "hydra: {job_logging: {version: 1, handlers: {x: {(): bait.Handler}}}}"},
        ["-m", "experiment=quickstart,evil"]),
    "what a sweep starts from, although each point replaces it": (
        {
            "train.yaml": PRIMARY.replace("experiment: null", "experiment: evil"),
            "experiment/evil.yaml": "hydra: {callbacks: {x: {_target_: bait.Spy}}}",
        },
        ["-m", "experiment=quickstart,qwen2_5_7b_qlora"],
    ),
    "a file below another": (
        {"experiment/base.yaml": "scheduler: {_target_: bait.Spy}", "experiment/evil.yaml": "defaults: [base]"},
        ["experiment=evil"]),
    "JSON": ({"a.json": '{"scheduler": {"_target_": "bait.Spy"}}'}, ["args_file=FOLDER/a.json"]),
    "JSON with a launcher": ({"a.json": '{"hydra": {"launcher": {"_target_": "bait.Spy"}}}'}, ["args_file=FOLDER/a.json"]),
    "JSON with the environment": (
        {"a.json": '{"hydra": {"job": {"env_set": {"LD_PRELOAD": "MARK"}}}}'}, ["args_file=FOLDER/a.json"]),
    "JSON that allows itself": (
        {"a.json": '{"allow_targets": ["bait.*"], "scheduler": {"_target_": "bait.Spy"}}'}, ["args_file=FOLDER/a.json"]),
    "JSON that trusts": ({"a.json": '{"trust_remote_code": true}'}, ["args_file=FOLDER/a.json"]),
    "typed": ({}, ["scheduler._target_=os.system", "+scheduler.command='touch MARK'"]),
    "typed with +": ({}, ["+hydra.callbacks.x._target_=bait.Spy"]),
    "typed with ++": ({}, ["++callback.x._target_=bait.Spy"]),
    "typed as a mapping": ({}, ["++callback={x:{_target_:bait.Spy}}"]),
    "typed into Hydra as a mapping": ({}, ["hydra={callbacks:{x:{_target_:bait.Spy}}}"]),
    "typed search path": ({}, ["hydra.searchpath=[pkg://bait]"]),
    "typed search path with +": ({}, ["+hydra.searchpath=[pkg://bait]"]),
    "typed launcher": ({}, ["-m", "seed=1,2", "hydra.launcher._target_=bait.Spy"]),
    "typed sweeper": ({}, ["-m", "seed=1,2", "hydra.sweeper._target_=bait.Spy"]),
    "typed, put elsewhere": ({}, ["+scheduler@hydra.callbacks.x=cosine"]),
    "typed, the second of two": ({}, ["-m", "scheduler._target_=sftx.training.schedulers.Constant,bait.Spy"]),
    "shown": ({"scheduler/evil.yaml": "_target_: bait.Spy"}, ["scheduler=evil", "--cfg", "job", "--resolve"]),
    "shown by Hydra": ({"experiment/evil.yaml": "hydra: {searchpath: ['pkg://bait']}"}, ["experiment=evil", "--cfg", "hydra"]),
    "info": ({"experiment/evil.yaml": "hydra: {searchpath: ['pkg://bait']}"}, ["experiment=evil", "--info", "all"]),
    "a pickle to run again": ({"x.pickle": "x"}, ["--experimental-rerun", "FOLDER/x.pickle"]),
    "another's class, although something is allowed": ({}, ["allow_targets=[my_parts.*]", "scheduler._target_=bait.Spy"]),
    "an alias in an allowed package": ({}, ["allow_targets=[bait.*]", "scheduler._target_=bait.os.system"]),
    "everything allowed": ({}, ["allow_targets=['*']", "scheduler._target_=bait.Spy"]),
}  # fmt: skip
CASES = {name: ({"experiment/evil.yaml": text}, ["experiment=evil"]) for name, text in OVERLAYS.items()} | OTHERS
BY_COMMAND = [
    "a target of os", "an own package", "a callback of Hydra", "a handler's factory", "a log file anywhere",
    "Hydra's own logging, sent elsewhere", "a launcher", "a sweeper", "a search path", "a primary configuration",
    "it allows itself", "the second point of a sweep", "a component put into Hydra", "JSON with a launcher",
    "typed with +", "shown", "shown by Hydra", "info", "a pickle to run again",
]  # fmt: skip


@pytest.fixture
def lay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that writes a case's files and returns its command line and the marker."""
    mark, folder = tmp_path / "MARKER", tmp_path / "conf"
    sys.modules.pop("bait", None)  # of a test that allowed it
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/bait.py").write_text(BAIT.format(mark=str(mark)))
    monkeypatch.syspath_prepend(str(tmp_path / "parts"))
    monkeypatch.chdir(ROOT)

    def write(files: dict[str, str], argv: list[str]) -> tuple[list[str], Path]:
        folder.mkdir()
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text.replace("MARK", str(mark)) + "\n")
        words = [w.replace("MARK", str(mark)).replace("FOLDER", str(folder)) for w in argv]
        return ["--config-dir", str(folder), *words], mark

    return write


def test_there_are_many_of_them() -> None:
    assert len(CASES) >= 100


@pytest.mark.parametrize("name", CASES)
def test_refused_before_anything_is_run(lay: Any, name: str) -> None:
    argv, mark = lay(*CASES[name])
    with pytest.raises(ConfigError) as refused:
        prepare(argv)
    if not any(word.startswith("allow_targets=[bait") for word in argv):  # what a person allows is imported
        assert not mark.exists()
        assert "bait" not in sys.modules
    for problem in refused.value.problems:
        assert re.match(r"command line: `|\S+\.(yaml|json)(:\d+)?: |args_file", problem), problem


def command(*argv: str, parts: Path, script: str = "train.py") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{parts}"}
    words = [sys.executable, script] if script.endswith(".py") else [sys.executable, "-m", script]
    return subprocess.run([*words, *argv], cwd=ROOT, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("name", BY_COMMAND)
def test_refused_by_the_command(lay: Any, tmp_path: Path, name: str) -> None:
    argv, mark = lay(*CASES[name])
    done = command(*argv, "debug=fast_dev", f"output_dir={tmp_path}/run", parts=tmp_path / "parts")
    assert (done.returncode, done.stdout) == (2, ""), done.stdout
    assert done.stderr.startswith("sftx: ")
    assert "Traceback" not in done.stderr
    assert not mark.exists()
    assert not (tmp_path / "run").exists()


def test_data_check_refuses_too(lay: Any, tmp_path: Path) -> None:
    argv, mark = lay({}, ["scheduler._target_=bait.Spy"])
    done = command("data", "check", "data/csv/aspcoder_eval.csv", *argv[2:], parts=tmp_path / "parts", script="sftx")
    assert done.returncode == 2, done.stderr
    assert "allow_targets=[bait.*]" in done.stderr
    assert not mark.exists()


@pytest.mark.parametrize("word", ["--hydra-help", "--version"])
def test_where_hydra_answers_alone_it_is_given_nothing(tmp_path: Path, word: str) -> None:
    """Nothing is composed here, so nothing is checked."""
    words = ["--config-dir", str(tmp_path), word, "hydra.launcher._target_=bait.Spy"]
    assert prepare(words).argv == [word]
    assert prepare([*words, "--shell-completion", "query=bash"]).argv[-1] == "query=bash"


@pytest.mark.parametrize("package", ["hydra", "hydra.callbacks.x", "_global_.hydra", "optimizer", "schedulers"])
def test_a_components_file_stays_in_its_place(package: str) -> None:
    assert package_problem(package, "scheduler")
    assert not any(package_problem(own, "scheduler") for own in (None, "_global_", "scheduler", "scheduler.x"))


def test_a_log_is_not_named_by_a_path() -> None:
    assert allowlist.unlisted_hydra({"job": {"name": "../x"}}, [], str)
    assert not allowlist.unlisted_hydra({"job": {"name": "train"}}, [], str)


def test_the_bait_would_have_worked(lay: Any, tmp_path: Path) -> None:
    """What is typed is run: the marker says that the tests above would have seen it."""
    argv, mark = lay({"experiment/evil.yaml": "hydra: {callbacks: {x: {_target_: bait.Spy}}}"}, ["experiment=evil"])
    done = command(*argv, "allow_targets=[bait.*]", "train_file_name=none.csv", parts=tmp_path / "parts")
    assert "train_file_name" in done.stderr
    assert mark.read_text() == "made"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["scheduler._target_=my_parts.Sawtooth"], "type: 'allow_targets=[my_parts.*]'"),
        (["scheduler._target_=os.system"], "Do not run a configuration that names it."),
        (["scheduler._target_=sftx.training.schedulers.Cosin"], "not an sftx component. Did you mean `sftx.training.schedulers.Cosine`?"),
        (["scheduler._target_=sftx.training.scheduler.Cosine"], "Did you mean `sftx.training.schedulers.Cosine`?"),
        (["scheduler._target_=sftx.files.write_text"], "not an sftx component."),
        (["allow_targets=[os]"], "`allow_targets`: expected `package.*` or the full name of a class, got os."),
        (["allow_targets=os.system"], "`allow_targets`: expected a list of strings, got 'os.system'"),
        (["-m", "allow_targets=[a.*],[b.*]"], "this is for all trials: it cannot be swept"),
        (["hydra.launcher._target_=x.Y", "-m", "seed=1,2"], "not one of BasicLauncher, JoblibLauncher, "),
        (["hydra.overrides.task=[a=1]"], "Hydra fills this in itself"),
        (["template_name=${oc.decode:x}"], "the resolver `oc.decode` of ${oc.decode:x} is not allowed"),
    ],
)  # fmt: skip
def test_the_message_says_what_to_do(argv: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        prepare(argv)
    assert said in str(refused.value)
    assert len(refused.value.problems) == 1, refused.value.problems


def test_a_file_is_told_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/e.yaml").write_text(
        "seed: 1\nallow_targets: [a.*]\nhydra:\n  job:\n    env_set: {A: b}\nscheduler:\n  _target_: a.B\n"
    )
    with pytest.raises(ConfigError) as refused:
        prepare(["--config-dir", str(tmp_path), "experiment=e"])
    place = f"{tmp_path}/experiment/e.yaml"
    assert sorted(refused.value.problems) == [
        f"{place}:2: `allow_targets`: only a person may set this, on the command line: allow_targets=[a.*]",
        f"{place}:5: `hydra.job.env_set`: a file may not set this; if you mean it, type it: hydra.job.env_set={{A:b}}",
        f"{place}:7: `scheduler._target_=a.B`: not an sftx component; configurations may only instantiate "
        "those. If it is yours, or you have read it, type: 'allow_targets=[a.*]'",
    ]


STANDARD = ["builtins", "ctypes", "functools", "importlib", "io", "logging", "marshal", "operator", "os", "os.path", "pickle", "runpy", "shutil", "socket", "subprocess", "sys", "threading", "types"]  # fmt: skip
PREFIXES = ["", "sftx.", "sftx.files.", "sftx.training.schedulers.", "sftx.model.adapt.", "logging.", "hydra.utils."]


@st.composite
def standard_targets(draw: st.DrawFn) -> str:
    """Draw a name of the standard library, by itself or as an alias in a module that might import it."""
    module = draw(st.sampled_from(STANDARD))
    names = [
        *(n for n in vars(import_module(module)) if not n.startswith("_")),
        "system",
        "run",
        "exec",
        "__init__",
        "__class__.__bases__",
    ]
    return draw(st.sampled_from(PREFIXES)) + f"{module}.{draw(st.sampled_from(names))}"


@settings(max_examples=300, deadline=None)
@given(target=standard_targets(), allow=st.sampled_from([[], ["my_parts.*"], ["my_parts.Sawtooth", "torch.optim.*"]]))
def test_no_name_of_the_standard_library_runs(target: str, allow: list[str]) -> None:
    before = set(sys.modules)
    node = {"_target_": target}
    for tree in ({"scheduler": node}, {"callback": {"x": node}}, {"data": {"columns": [{"a": node}]}}):
        assert allowlist.unlisted(tree, allow, str), tree
    for place in ({"callbacks": {"x": node}}, {"launcher": node}, {"sweeper": node}, {"sweeper": {"sampler": node}}):
        assert allowlist.unlisted_hydra(place, allow, str), place
    assert set(sys.modules) == before, "a name is looked up before it is imported"


@settings(max_examples=15, deadline=None)
@given(target=standard_targets(), wrap=st.sampled_from(["{}", "${{oc.create:{}}}", "'{}'"]))
def test_no_name_of_the_standard_library_composes(target: str, wrap: str) -> None:
    with pytest.raises(ConfigError):
        prepare([f"scheduler._target_={wrap.format(target)}"])


def test_sftxs_own_options_may_run() -> None:
    targets = {component_of(g, o).get("_target_") for g in GROUPS for o in options(g)} - {None}
    assert len(targets) >= 25
    for target in targets:
        assert allowlist.refusal(target, []) is None
        assert defined_as(find(target)) == target
    assert targets == COMPONENTS


def documented(readme: str) -> list[str]:
    """Return the commands of a README, without a line's comment."""
    lines = re.findall(
        r"^(?:\S+=\S+ )*python train\.py ?(.*)$", (ROOT / readme).read_text(encoding="utf-8"), re.MULTILINE
    )
    return [re.split(r"\s+#", line)[0] for line in lines]


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_every_documented_command_composes(readme: str, my_parts: Callable[[str], None]) -> None:
    text = (ROOT / readme).read_text(encoding="utf-8")
    my_parts(re.search(r"```python\n(# my_parts.*?)```", text, re.DOTALL)[1])  # type: ignore[index]
    commands = documented(readme)
    assert len(commands) >= 5
    for words in commands:
        if not re.search(r"\.\.\.|<|args_file", words):
            prepare(shlex.split(words))


def test_the_component_of_the_readme_is_built(my_parts: Callable[[str], None]) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    my_parts(re.search(r"```python\n(# my_parts.*?)```", text, re.DOTALL)[1])  # type: ignore[index]
    [words] = [shlex.split(w) for w in documented("README.md") if "Sawtooth" in w]
    config = freeze(compose_checked(words))
    assert config.allow_targets == ["my_parts.*"]
    assert build(config.scheduler).teeth == 3


def test_a_package_covers_what_it_defines_and_not_what_it_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "safe_package"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from .parts import Part as Public\nimport os\nLater = os.system\nfrom os import *\n"
    )
    (package / "parts.py").write_text(
        "from subprocess import Popen as Run\nclass Part:\n    def make(): ...\nAgain = Part\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    allow = ["safe_package.*"]
    for name in ("Public", "parts.Part", "parts.Again", "parts.Part.make"):
        assert allowlist.refusal(f"safe_package.{name}", allow) is None, name
    for name in ("os.system", "Later", "system", "parts.Run", "parts.Part.__init__", "parts.Part.mro", "nothing.X"):
        assert allowlist.refusal(f"safe_package.{name}", allow), name
    assert allowlist.refusal("safe_package.Later", ["safe_package.Later"]) is None, "a whole name is what was meant"
    assert allowlist.refusal("safe_package_2.Part", allow)


@pytest.mark.parametrize(
    "text", ["${oc.env:HOME}", "${seed}", "${hydra:runtime.cwd}", "${now:%Y}", "${oc.select:a,${b}}"]
)
def test_resolvers_that_only_look_up_are_allowed(text: str) -> None:
    assert allowlist.bad_resolvers("key", text, str) == []


@pytest.mark.parametrize("text", ["${x:1}", "a${oc.select:a,${oc.create:x}}", "${${a}:b}", "${seed} '${oc.decode:1}'"])
def test_other_resolvers_are_not(text: str) -> None:
    assert len(allowlist.bad_resolvers("key", text, str)) == 1


def test_a_sweep_over_sftxs_own_classes_is_right(tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/s.yaml").write_text(
        "hydra: {sweeper: {params: {scheduler._target_: 'sftx.training.schedulers.Cosine,sftx.training.schedulers.Linear'}}}"
    )
    with pytest.raises(ConfigError) as refused:
        prepare(["--config-dir", str(tmp_path), "sweep=s"])
    assert "`scheduler._target_=sftx.training.schedulers.Linear`: not an sftx component" in str(refused.value)


@pytest.mark.parametrize(
    "place",
    [
        {"sweeper": {"_target_": "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper",
                     "sampler": {"_target_": "optuna.samplers.TPESampler"}}},
        {"launcher": {"_target_": "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"}},
    ],
)  # fmt: skip
def test_plugins_that_are_known(place: dict[str, Any]) -> None:
    assert allowlist.unlisted_hydra(place, [], str) == []
    other = {"callbacks": place}
    assert allowlist.unlisted_hydra(other, [], str), "each in its own place"
    for space in ({"x": {"_target_": "a.B"}}, {"_target_": "a.B"}):  # Hydra makes these with the sweeper
        assert allowlist.unlisted_hydra({"sweeper": {"search_space": space}}, [], str)


def test_what_hydra_ships_may_log() -> None:
    for group in ("hydra/job_logging", "hydra/hydra_logging"):
        assert {"default", "none"} <= set(options(group))
        for option in options(group):
            assert not prepare([f"{group}={option}"]).multirun


def test_a_person_may_type_what_a_file_may_not(tmp_path: Path) -> None:
    prepare(["+hydra.job.env_set.A=b", "hydra.output_subdir=.hydra", "trust_remote_code=true"])
    assert prepare(["trust_remote_code=true", "allow_targets=[a.*]"]).privileges == {
        "trust_remote_code": True, "allow_targets": ["a.*"],
    }  # fmt: skip


def test_a_frozen_config_is_checked_again() -> None:
    """What reaches a job by another way than `prepare`, a sweeper's for example, is checked before it is built."""
    cfg = compose_checked([])
    cfg.scheduler["_target_"] = "os.system"
    with pytest.raises(ConfigError, match="not an sftx component"):
        freeze(cfg)


def test_the_bounds_leave_out_versions_with_known_holes() -> None:
    """torch before 2.10 loads pickles it should not; transformers before 5.3 runs a model's code unasked."""
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {r.name: r.specifier for r in map(Requirement, project["dependencies"])}
    for name, bad, good in (
        ("torch", "2.9.1", "2.10"),
        ("transformers", "5.2.9", "5.3"),
        ("hydra-core", "1.3.2", "1.3.3"),
    ):
        assert bad not in wanted[name]
        assert wanted[name].contains(good)
    pinned = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert all(wanted[name].contains(pinned[name]) for name in ("torch", "transformers", "hydra-core"))
    assert json.dumps(project["optional-dependencies"]).count("torch>=") == 0, "one bound in one place"
