"""The real `train.py` as a user runs it: what is printed, the exit code, and that nothing heavy was imported."""

import json
import os
import resource
import subprocess
import sys

import pytest

from sftx import PROJECT_ROOT
from sftx.config.schema import GROUPS, KNOBS

WATCHED = """
import runpy, sys
try:
    runpy.run_path("train.py", run_name="__main__")
finally:
    heavy = {"torch", "transformers", "peft", "accelerate", "bitsandbytes", "numpy"} & set(sys.modules)
    print("HEAVY:" + ",".join(sorted(heavy)), file=sys.stderr)
"""


def train(*argv, **environment):
    """Run `python train.py`, and say what heavy it imported."""
    env = {k: v for k, v in os.environ.items() if k not in ("LANG", "LC_ALL", "LC_MESSAGES")}
    env |= {"PYTHONPATH": str(PROJECT_ROOT / "src"), "PYTHONIOENCODING": "utf-8", **environment}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *argv], cwd=PROJECT_ROOT, env=env, capture_output=True, encoding="utf-8"
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = (
        after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    )  # of the processor: others may be busy
    err, _, heavy = done.stderr.rpartition("HEAVY:")
    assert heavy.strip() == "", "imported before the configuration was right"
    return done.returncode, done.stdout, err, seconds


def test_mistakes_everywhere_at_once(tmp_path):
    """One run of the program names all of them and stops with 2, at once and without a traceback."""
    for group in ("experiment", "sweep"):
        (tmp_path / group).mkdir()
    (tmp_path / "experiment/mine.yaml").write_text("seed: abc\noptimizer: adamw_tourch\nscheduler: {poewr: 2}\n")
    (tmp_path / "sweep/mine.yaml").write_text("hydra: {sweeper: {params: {lora_alpha: '8,x'}}}\n")
    (tmp_path / "my.json").write_text('{"lora_dropout": 1.5,\n"lora_rnk": 8}')
    code, out, err, seconds = train(
        "--config-dir", str(tmp_path), "experiment=mine", "sweep=mine", f"args_file={tmp_path}/my.json",
        "mode=qlra", "logging_steps=0", "hydra.swep.dir=x",
    )  # fmt: skip
    assert (code, out) == (2, "")
    assert err.startswith("sftx: 9 problems in the configuration\n")
    assert "Traceback" not in err
    assert seconds < 3
    for said in (
        f"{tmp_path}/experiment/mine.yaml:1: `seed`: expected an integer >= 0 and <= 9223372036854775807, got 'abc'",
        f"{tmp_path}/experiment/mine.yaml:2: `optimizer` has no option 'adamw_tourch'. Did you mean `adamw_torch`?",
        f"{tmp_path}/experiment/mine.yaml:3: unknown key `scheduler.poewr`",
        f"{tmp_path}/sweep/mine.yaml:1: `lora_alpha`: expected a number > 0, got 'x'",
        f"{tmp_path}/my.json:1: `lora_dropout`: expected a number >= 0 and < 1, got 1.5",
        f"{tmp_path}/my.json:2: unknown key `lora_rnk` (value 8). Did you mean `lora_rank`?",
        "command line: `mode=qlra`: `mode` has no option 'qlra'. Did you mean `qlora`?",
        "command line: `logging_steps=0`: `logging_steps`: expected an integer >= 1, got 0",
        "command line: `hydra.swep.dir=x`: unknown key `hydra.swep`. Did you mean `sweep`?",
    ):
        assert said in err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--cfg", "job", "lora_rnk=3"], "Did you mean `lora_rank`?"),
        (["-m", "lora_rank=8,16", "mode=lora,qlra"], "Did you mean `qlora`?"),
        (["args_file=nowhere.json"], "cannot read nowhere.json"),
    ],
)
def test_a_mistake_stops_with_2_and_runs_nothing(argv, said):
    code, out, err, seconds = train(*argv)
    assert (code, out) == (2, "")
    assert err.startswith("sftx: 1 problem in the configuration\n")
    assert said in err
    assert seconds < 3


def test_cfg_prints_the_same_for_either_spelling(tmp_path):
    manual = ["train_mode=qlora", "optim=adamw_torch", "lr_scheduler_type=cosine", "report_to=wandb", "bf16=true"]
    groups = ["mode=qlora", "optimizer=adamw", "scheduler=cosine", "tracker=[wandb]", "precision=bf16"]
    (tmp_path / "my.json").write_text(json.dumps(dict(k.split("=") for k in manual[:4]) | {"bf16": True}))
    code, printed, err, seconds = train("--cfg", "job", *groups)
    assert (code, err) == (0, "")
    assert "train_mode: qlora\n" in printed
    assert seconds < 3
    assert train("--cfg", "job", *manual)[1] == printed
    assert train("--train_args_file", f"{tmp_path}/my.json", "--cfg", "job")[1] == printed


def test_cfg_of_a_sweep_shows_its_first_point():
    assert "lora_rank: 8\n" in train("-m", "--cfg", "job", "lora_rank=8,16")[1]
    code, printed, err, _ = train("--cfg", "job", "--resolve", "sweep=lr_and_rank", "train_file_name=训练 (1).csv")
    assert (code, err) == (0, "")
    assert "learning_rate: 0.0001\n" in printed
    assert "  rank: 8\n" in printed
    assert "train_file_name: 训练 (1).csv\n" in printed


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--cfg", "job", "-p", "data"], "category_weights:\n  html: 2\n"),
        (["--cfg", "all"], "  category_weights:\n    html: 2\n"),
        (["--cfg", "hydra"], "data.category_weights={html:2}"),
        (["--cfg", "hydra", "hydra.job.env_set={A:b}"], "    env_set:\n      A: b\n"),
    ],
)
def test_cfg_shows_a_mapping_that_was_typed(flags, said):
    code, out, err, _ = train(*flags, "data.category_weights={html:2}")
    assert (code, err) == (0, "")
    assert said in out


@pytest.mark.parametrize("language", ["en_US.UTF-8", "zh_CN.UTF-8"])
def test_help(language):
    code, out, err, seconds = train("--help", LANG=language)
    assert (code, err) == (0, "")
    assert all(f"\n  {name}" in out for name in (*KNOBS, *GROUPS))
    assert ("有监督微调" in out) is language.startswith("zh")
    assert all(f"\n  {group} " in out for group in ("scheduler=constant_with_warmup", "callback=[]", "experiment=null"))
    assert seconds < 3


def test_hydras_own_help_is_left_to_hydra():
    code, out, _, _ = train("--hydra-help")
    assert code == 0
    assert "--multirun" in out


@pytest.mark.parametrize("flag", ["--help", "--info"])
def test_a_pipe_that_closes_leaves_no_traceback(flag: str) -> None:
    command = [sys.executable, "train.py", flag]
    with subprocess.Popen(
        command, cwd=PROJECT_ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.close()  # as `| head` does when it has seen enough
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert process.returncode == (141 if flag == "--help" else 0)
