"""Write constraints.txt: resolve every extra of pyproject.toml, keep names and versions.

python .ci/lock.py > constraints.txt     (or: make lock)
"""

import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAD = """\
# Every package that sftx can install, pinned; made by `make lock` from the extras of pyproject.toml.
# torch carries no local suffix (+cpu, +cu128): which build is installed is chosen by TORCH_INDEX (see the Makefile),
# and torch itself brings the nvidia packages that fit it. triton is the one that torch's CUDA builds require: change
# both by hand, together.
"""


def main() -> None:
    """Ask pip to resolve, without installing, and print the lock."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(d for name, group in extras.items() if name != "gpu" for d in group)]
    lines = (ROOT / "constraints.txt").read_text().split()
    pinned = [line for line in lines if line.startswith(("torch==", "triton=="))]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        command += ["--no-build-isolation", "--report", str(report), *pinned, *wanted]
        subprocess.run(command, check=True, stdout=sys.stderr)
        found = json.loads(report.read_text())["install"]
    versions = {i["metadata"]["name"].lower().replace("_", "-"): i["metadata"]["version"] for i in found}
    versions |= {d.split(">=")[0]: d.split(">=")[1] for d in extras["gpu"] if d.split(">=")[0] not in versions}
    kept = {n: v.split("+")[0] for n, v in versions.items() if not n.startswith("nvidia") and n != "setuptools"}
    print(HEAD + "\n".join(f"{n}=={v}" for n, v in sorted(kept.items())))


if __name__ == "__main__":
    main()
