"""Checkpoints: published atomically, verified by hash, safetensors and JSON only.

A checkpoint is `step-000100/`: the weights as `final/` would hold them, `optimizer.safetensors` with
`optimizer.json`, `state.json` (the run's progress), and `manifest.json` (SHA-256 of every file, and of itself).
Random state is not in it: every draw is a function of (seed, step), so there is none to keep.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sftx.data.records.read import sha256_file
from sftx.errors import CheckpointError, DataError, ModelError, TrainingError, other_format
from sftx.files import remove_folder, write_folder
from sftx.model.adapt import AdaptedModel
from sftx.model.export.weights import bytes_of, read_weights
from sftx.parallel.stepper import Weights

if TYPE_CHECKING:
    from sftx.training.trial import Trial

FORMAT = 3
"""Of checkpoints, in their manifest; raise it when an older version could not read a new one, or the reverse."""
MANIFEST = "manifest.json"
READ = (".json", ".safetensors")
"""Suffixes of the files that a resumed run reads: a checkpoint may hold no unlisted one."""


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
    """A trial as it stood after a step, in host memory: training may continue while it is written."""

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

    Raises:
        RunFolderError: it cannot be written; what was published before is as it was.
        TrainingError: it holds numbers that are not finite.
    """
    check_finite(snapshot.step, snapshot.weights, snapshot.optimizer)

    def fill(into: Path) -> None:
        snapshot.write(into)
        hashes = {str(p.relative_to(into)): sha256_file(p) for p in sorted(into.rglob("*")) if p.is_file()}
        (into / MANIFEST).write_bytes(_sealed({"format": FORMAT, "step": snapshot.step, "sha256": hashes}))

    folder = folder_of(root, snapshot.step)
    write_folder(folder, fill, replace=True, needed=snapshot.nbytes)
    return folder


def check_finite(step: int, *kinds: Weights) -> None:
    """Raise before tensors are published that are not finite.

    Raises:
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


def _sealed(facts: dict[str, Any]) -> bytes:
    """Return a manifest, which carries the hash of its facts; so it does in every format."""
    own = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return json.dumps(facts | {"self": own}, indent=2).encode()


def problem_of(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None when every file is as it was written.

    Raises:
        CheckpointError: its manifest is sound, but of a format that this version does not read.
    """
    path = folder / MANIFEST
    if path.is_symlink() or not path.is_file():
        return f"{MANIFEST} is missing" if folder.is_dir() else "it is not a folder"
    try:
        written = path.read_bytes()
        facts = json.loads(written)
        if written != _sealed({k: v for k, v in facts.items() if k != "self"}):  # to the last byte: any change shows
            return f"{MANIFEST} is damaged"
        if (found := facts.get("format")) != FORMAT:
            raise CheckpointError(
                f"{folder}: {other_format(found, FORMAT)}. Continue it with the version that wrote it, or start over "
                "in another output_dir."
            )
        step, hashes = facts["step"], facts["sha256"]
        for name, digest in hashes.items():
            if (folder / name).is_symlink():
                return f"{name} is a link"  # to what may be removed meanwhile
            if not (folder / name).is_file():
                return f"{name} is missing"
            try:
                if sha256_file(folder / name) != digest:
                    return f"{name} is damaged"
            except DataError:
                return f"{name} cannot be read"
        there = [p.relative_to(folder) for p in folder.rglob("*") if p.suffix in READ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    unlisted = {str(p) for p in there} - hashes.keys() - {MANIFEST}
    if unlisted:
        return f"{min(unlisted)} is not one of its files"
    needed = {"state.json", "optimizer.json", "optimizer.safetensors"} - hashes.keys()
    if needed:
        return f"{min(needed)} is not listed"
    return f"it is that of step {step}" if step_of(folder) not in (-1, step) else None


def newest_verified(root: Path) -> tuple[Path | None, list[str]]:
    """Return the newest intact checkpoint, and what is wrong with each newer one.

    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged; or one is of another format.
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
            "no checkpoint of this run is intact, and starting over silently would lose it:\n  "
            + "\n  ".join(problems)
            + "\nRemove them to start over, or choose another output_dir."
        )
    return None, problems


def named(path: Path) -> tuple[Path, list[str]]:
    """Return the checkpoint that a path names, and what is wrong with newer ones: of a run its newest intact one.

    Raises:
        CheckpointError: it is a run's folder without an intact checkpoint.
    """
    inside = path / "checkpoints"
    is_run = inside.is_dir() or (path / "config.yaml").is_file()
    if not is_run and not listed(path):
        return path, []
    newest, problems = newest_verified(inside if is_run else path)
    if newest is None:
        raise CheckpointError(f"resume={path}: this run has no checkpoint yet. Name another run, or a checkpoint.")
    return newest, problems


def restore(folder: Path, model: AdaptedModel, trial: Trial) -> dict[str, Any]:
    """Let a trial stand where a checkpoint was taken, and return its state; every rank calls it.

    Raises:
        CheckpointError: it is damaged, another run's, or of another format.
    """
    from safetensors.torch import load_file

    cure = "Resume from another checkpoint, or remove it."
    problem = problem_of(folder)
    if problem:
        raise CheckpointError(f"{folder}: {problem}. {cure}")
    rest = json.loads((folder / "optimizer.json").read_text(encoding="utf-8"))
    try:
        trial.stepper.load_weights(read_weights(model, trial.adapter, folder))
        trial.stepper.load_state(load_file(folder / "optimizer.safetensors"), rest)
    except (ModelError, CheckpointError, KeyError) as error:
        what = (
            f"{folder}: its optimizer's state holds {error}, which this run has not."
            if isinstance(error, KeyError)
            else str(error)
        )
        what = what if str(folder) in what else f"{folder}: {what}"
        raise CheckpointError(f"{what} It is a checkpoint of another run. {cure}") from error
    path = folder / "state.json"
    try:
        state = dict(json.loads(path.read_text(encoding="utf-8")))
        trial.restore(state)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: does not hold what this version reads ({type(error).__name__}: {error}): another version of sftx "
            f"wrote it. Continue it with that version, or start over in another output_dir."
        ) from error
    return state
