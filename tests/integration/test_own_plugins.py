"""A launcher and a sweeper of sftx's own: modules `hydra_plugins.sftx_*`, with option files, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import ROOT, SMALL, over

PLUGINS = '''
from hydra.core.utils import JobReturn, JobStatus, run_job
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from omegaconf import open_dict


class EchoLauncher(Launcher):
    """Prints what it launches, and launches it here."""

    def __init__(self, name: str) -> None:
        self.name = name

    def setup(self, *, hydra_context, task_function, config) -> None:
        self.context, self.task, self.config = hydra_context, task_function, config

    def launch(self, job_overrides, initial_job_idx):
        runs = []
        for number, overrides in enumerate(job_overrides, initial_job_idx):
            print(f"{self.name} launches {number}: {' '.join(overrides)}", flush=True)
            config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
            with open_dict(config):
                config.hydra.job.id, config.hydra.job.num = f"echo_{number}", number
            runs.append(run_job(
                hydra_context=self.context, task_function=self.task, config=config,
                job_dir_key="hydra.sweep.dir", job_subdir_key="hydra.sweep.subdir",
            ))
        return runs


class TwiceSweeper(Sweeper):
    """Tries two seeds."""

    def __init__(self, n_trials: int) -> None:
        self.n_trials = n_trials

    def setup(self, *, hydra_context, task_function, config) -> None:
        from hydra.core.plugins import Plugins

        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments):
        return self.launcher.launch([[*arguments, f"seed={n}"] for n in range(self.n_trials)], initial_job_idx=0)
'''


@pytest.fixture
def own(tmp_path: Path) -> Path:
    module = tmp_path / "hydra_plugins/sftx_echo/__init__.py"
    module.parent.mkdir(parents=True)
    module.write_text(PLUGINS)
    for kind, name, text in (
        ("launcher", "echo", "_target_: hydra_plugins.sftx_echo.EchoLauncher\nname: Echo\n"),
        ("sweeper", "twice", "_target_: hydra_plugins.sftx_echo.TwiceSweeper\nn_trials: 2\n"),
    ):
        (tmp_path / f"conf/hydra/{kind}").mkdir(parents=True)
        (tmp_path / f"conf/hydra/{kind}/{name}.yaml").write_text(text)
    return tmp_path


def train(own: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "train.py", "--config-dir", str(own / "conf"), *words]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{own}"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_a_launcher_and_a_sweeper_of_our_own_run_the_trials(own: Path) -> None:
    done = train(
        own, "-m", "hydra/launcher=echo", "hydra/sweeper=twice", f"hydra.sweep.dir={own}/sweep",
        *(word for word in over(SMALL, "max_steps=1") if not word.startswith("output_dir")),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if "Echo launches" in line][1].endswith("seed=1")
    outcomes = [json.loads((own / f"sweep/{n}/trial.json").read_text()) for n in (0, 1)]
    assert [outcome["status"] for outcome in outcomes] == ["completed", "completed"]
    assert "2 trials in" in done.stdout


def test_what_a_file_may_give_them_is_limited(own: Path) -> None:
    (own / "conf/hydra/launcher/echo.yaml").write_text(
        "_target_: hydra_plugins.sftx_echo.EchoLauncher\nsetup: [touch x]\n"
    )
    done = train(own, "-m", "seed=1,2", "hydra/launcher=echo")
    assert done.returncode == 2
    assert f"{own}/conf/hydra/launcher/echo.yaml:2: `hydra.launcher.setup`: a file may not set this" in done.stderr
