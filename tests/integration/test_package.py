"""The wheel: what it holds, and that it trains in an empty folder as the checkout does."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sftx import PROJECT_ROOT as ROOT

FOLDERS = {"conf": "conf", "sweeps": "sweeps", "launchers": "launchers", "data": "embedded"}
"""Folders of the checkout, and their names inside the package."""
PACKED = {"data": "aspcoder_*.csv"}
"""Which files of a folder, where it may hold others."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build the wheel from a copy, so that nothing is left in the checkout and nothing old is packed."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("src", *FOLDERS):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--wheel-dir", tree / "dist", tree], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next((tree / "dist").glob("sftx-*.whl"))


@pytest.fixture
def installed(wheel, tmp_path):
    """Return a function that runs `python -m sftx` from the unpacked wheel, in an empty folder."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "empty").mkdir()

    def sftx(*words, ok=True):
        environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "sftx", *words],
            cwd=tmp_path / "empty", env=environment, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert (done.returncode == 0) == ok, done.stdout + done.stderr
        return done.stdout + done.stderr

    return sftx


def test_the_wheel_holds_every_file_of_the_package_and_of_its_folders(wheel):
    files = {p.relative_to(ROOT / "src").as_posix() for p in (ROOT / "src/sftx").rglob("*") if p.is_file()}
    for folder, inside in FOLDERS.items():
        files |= {
            f"sftx/{inside}/{p.relative_to(ROOT / folder).as_posix()}"
            for p in (ROOT / folder).rglob(PACKED.get(folder, "*"))
            if p.is_file()
        }
    wanted = {name for name in files if "__pycache__" not in name}
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == wanted
    assert {n.rsplit("/")[-1] for n in names if ".dist-info/" in n} >= {"LICENSE", "entry_points.txt"}


def test_commands_name_sftx_train(installed, tmp_path):
    """There is no train.py beside an installed package."""
    assert "\n  sftx train mode=qlora lora_rank=32\n" in installed("train", "--help")
    assert "All keys: sftx train --help" in installed("train", "lora_rnk=3", ok=False)
    shown = installed("train", "--cfg", "job", "sweep=lr_and_rank")
    assert "train_file_name: aspcoder_train.csv" in shown
    assert list((tmp_path / "empty").iterdir()) == []


@pytest.mark.slow
def test_an_installed_package_trains_in_an_empty_folder(installed, tmp_path):
    out = installed("train", "mode=qlora", "lora_rank=32", "max_steps=2")
    run = next((tmp_path / "empty/outputs/runs").glob("*/*-qlora-*"))
    assert (run / "final/adapter_model.safetensors").is_file()
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["command"] == "sftx train mode=qlora lora_rank=32 max_steps=2"
    assert Path(manifest["data"][0]["path"]) == tmp_path / "site/sftx/embedded/aspcoder_train.csv"
    assert manifest["environment"]["git"] == {}
    assert "sftx train model=smollm2" in out
    assert "train.py" not in out
    assert (tmp_path / "empty/outputs/latest").resolve() == run.resolve()
    first, second = installed("ls").splitlines()
    assert first.split() == ["state", "best", "loss", "started", "run", "command"]
    assert second.startswith("completed  8.5")
    assert second.endswith(f"{run.relative_to(tmp_path / 'empty')}  {manifest['command']}")
    assert "is finished" in installed("train", "mode=qlora", "lora_rank=32", "max_steps=2", f"output_dir={run}")
    assert "no difference" in installed("repro", str(run), "--check")


@pytest.mark.slow
def test_an_installed_package_trains_in_two_processes_with_a_component_of_the_users(installed, tmp_path):
    (tmp_path / "empty/my_parts.py").write_text(
        "from dataclasses import dataclass\nfrom sftx.training.schedulers import Schedule\n\n@dataclass\n"
        "class Flat(Schedule):\n    def shape(self, step: int, total: int) -> float:\n        return 1.0\n"
    )
    installed(
        "train", "mode=lora", "max_steps=1", "parallel=ddp", "parallel.num_processes=2", "output_dir=run",
        "scheduler._target_=my_parts.Flat", "allow_targets=[my_parts.*]",
    )  # fmt: skip
    assert json.loads((tmp_path / "empty/run/manifest.json").read_text())["ranks"] == 2
