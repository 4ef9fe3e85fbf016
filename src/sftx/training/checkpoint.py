"""Checkpoints: published whole or not at all, verified by hash, safetensors and JSON only.

A checkpoint is `step-000100/`: the weights as `final/` would hold them, `optimizer.safetensors` with
`optimizer.json`, `state.json` (where the run stands), and `manifest.json` (SHA-256 of every file).
Random state is not in it: every draw is a function of (seed, step), so there is none to keep.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sftx.data.read import sha256_file
from sftx.errors import CheckpointError, TrainingError
from sftx.files import remove_folder, write_folder
from sftx.model.adapt import AdaptedModel, Adapter
from sftx.model.export import bytes_of, read_weights
from sftx.parallel.engine import Stepper, Weights

MANIFEST = "manifest.json"


def folder_of(root: Path, step: int) -> Path:
    """Return a checkpoint's folder."""
    return root / f"step-{step:06d}"


def step_of(folder: Path) -> int:
    """Return the step in a checkpoint's name."""
    match = re.fullmatch(r"step-(\d+)", folder.name)
    return int(match.group(1)) if match else -1


def listed(root: Path) -> list[Path]:
    """Return the published checkpoints, oldest first."""
    return sorted((p for p in root.glob("step-*") if step_of(p) >= 0), key=step_of) if root.is_dir() else []


@dataclass(frozen=True)
class Snapshot:
    """A trial as it stood after a step, in host memory: training may go on while it is written."""

    step: int
    weights: Weights
    write_weights: Callable[[Path], None]
    """Writes `weights` as `final/` would hold them."""
    optimizer: Weights
    texts: dict[str, str]
    """`optimizer.json` and `state.json`."""

    @property
    def nbytes(self) -> int:
        """Bytes on disk, about."""
        return bytes_of(self.weights, self.optimizer)

    def write(self, into: Path) -> None:
        """Write everything but the manifest into a folder."""
        from safetensors.torch import save_file

        self.write_weights(into)
        save_file(self.optimizer, into / "optimizer.safetensors")
        for name, text in self.texts.items():
            (into / name).write_text(text, encoding="utf-8")


def publish(root: Path, snapshot: Snapshot) -> Path:
    """Publish a checkpoint.

    Errors:
        RunFolderError: it cannot be written; what was published before is as it was.
        TrainingError: it holds numbers that are not finite.
    """
    check_finite(snapshot.step, snapshot.weights, snapshot.optimizer)

    def fill(into: Path) -> None:
        snapshot.write(into)
        hashes = {str(p.relative_to(into)): sha256_file(p) for p in sorted(into.rglob("*")) if p.is_file()}
        (into / MANIFEST).write_text(json.dumps({"step": snapshot.step, "sha256": hashes}, indent=2), encoding="utf-8")

    folder = folder_of(root, snapshot.step)
    write_folder(folder, fill, replace=True, needed=snapshot.nbytes)
    return folder


def check_finite(step: int, *kinds: Weights) -> None:
    """Raise before tensors are published that are not finite.

    Errors:
        TrainingError: one is not; its name is given.
    """
    for tensors in kinds:
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise TrainingError(
                    f"step {step}: `{name}` holds numbers that are not finite, and is not saved. Go on from an earlier "
                    "checkpoint (the same command does) with a smaller learning_rate in another output_dir."
                )


def rotate(root: Path, limit: int | None, best_step: int | None) -> None:
    """Remove the oldest checkpoints beyond `limit`, never the newest and never the best."""
    if limit is None:
        return
    for folder in listed(root)[:-limit]:
        if step_of(folder) != best_step:
            remove_folder(folder)


def problem_of(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None when every file is as it was written."""
    try:
        hashes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["sha256"]
        for name, digest in hashes.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if sha256_file(path) != digest:
                return f"{name} is damaged"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    needed = {"state.json", "optimizer.json", "optimizer.safetensors"} - set(hashes)
    return f"{min(needed)} is not listed" if needed else None


def newest_verified(root: Path) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint, and what is wrong with each newer one.

    Errors:
        CheckpointError: there are checkpoints, and all of them are damaged.
    """
    problems: list[str] = []
    folders = listed(root)
    for folder in reversed(folders):
        problem = problem_of(folder)
        if problem is None:
            return folder, problems
        problems.append(f"{folder}: {problem}")
    if folders:
        raise CheckpointError(
            "no checkpoint of this run is whole, and starting over silently would lose it:\n  "
            + "\n  ".join(problems)
            + "\nRemove them to start over, or choose another output_dir."
        )
    return None, problems


def load(folder: Path, model: AdaptedModel, adapter: Adapter, stepper: Stepper) -> dict[str, Any]:
    """Restore weights and optimizer from a checkpoint, and return its state.

    Errors:
        CheckpointError: it is damaged.
    """
    from safetensors.torch import load_file

    problem = problem_of(folder)
    if problem:
        raise CheckpointError(f"{folder}: {problem}. Resume from another checkpoint, or remove it.")
    stepper.load_weights(read_weights(model, adapter, folder))
    rest = json.loads((folder / "optimizer.json").read_text(encoding="utf-8"))
    stepper.load_state(load_file(folder / "optimizer.safetensors"), rest)
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))
