"""A config group is added in two places: the schema, and `conf/` (its folder and its line in the defaults list)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

FIELD = """    cooling: Node = group("how the room is cooled", "如何降温", "sftx.cooling: Fan")
"""
FAN = '''"""Cooling."""
from dataclasses import dataclass
from typing import Annotated

from sftx.config.bounds import Bounds


@dataclass
class Fan:
    """A fan."""

    blades: Annotated[int, Bounds(at_least=2)]
'''


def test_a_group_is_added_in_two_places(tmp_path: Path) -> None:
    for folder in ("src", "conf", "sweeps", "data"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", tmp_path)
    [schema] = (tmp_path / "src/sftx/config").rglob("schema.py")
    text = schema.read_text(encoding="utf-8")
    schema.write_text(text.replace("    data: Node = group(", FIELD + "    data: Node = group(", 1), encoding="utf-8")
    (tmp_path / "src/sftx/cooling.py").write_text(FAN)
    (tmp_path / "conf/cooling").mkdir()
    (tmp_path / "conf/cooling/fan.yaml").write_text("# A fan with blades.\n_target_: sftx.cooling.Fan\nblades: 3\n")
    train = tmp_path / "conf/train.yaml"
    train.write_text(train.read_text().replace("  - data: aspcoder\n", "  - data: aspcoder\n  - cooling: fan\n", 1))

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(tmp_path / "src"), "LANG": "C"}
        command = [sys.executable, "train.py", *words]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    assert "cooling:\n  _target_: sftx.cooling.Fan\n  blades: 5\n" in run("--cfg", "job", "cooling.blades=5").stdout
    assert "`cooling.blades`: expected an integer >= 2, got 1" in run("cooling.blades=1").stderr
    assert "Did you mean `blades`?" in run("cooling.blade=1").stderr
    assert "`cooling` has no option 'fun'. Did you mean `fan`?" in run("cooling=fun").stderr
    assert "cooling=fan" in run("--help").stdout
    page = subprocess.run(
        [sys.executable, "-m", "sftx.config.help.reference"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": "src"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "`cooling.blades`: `3`, an integer >= 2" in page.stdout
