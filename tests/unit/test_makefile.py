"""What `make` would do, as `make --dry-run` prints it."""

import shutil
import subprocess

import pytest

from sftx import PROJECT_ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def commands(target: str, folder: str) -> str:
    command = ["make", "--dry-run", "--no-print-directory", target, f"VENV={folder}"]
    return subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("target", "extras"),
    [("train", []), ("smollm2", ["gguf"]), ("test", ["dev"]), ("test-slow", ["dev", "dev,deepspeed"])],
)
def test_a_target_installs_what_it_needs_only(target: str, extras: list[str], tmp_path) -> None:
    said = commands(target, str(tmp_path / "venv"))
    installed = [line for line in said.splitlines() if " install " in line]
    assert [line.split(" -e ")[1].strip("'") for line in installed if " -e " in line] == [
        ".",
        *(f".[{extra}]" for extra in extras),
    ]
