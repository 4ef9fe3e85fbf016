"""Where an adapter or a checkpoint that a run starts from was made, compared with the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sftx.config.derive import differences
from sftx.model.loading.load import Source
from sftx.model_folders import local_folder, reference_to
from sftx.runs.saved.saved_run import read_object
from sftx.secrets import scrub
from sftx.training.saving.run_folder import MANIFEST

NAMED = 5
"""So many differences are named."""


def foreign_adapter(folder: Path, source: Source, fingerprint: str) -> str | None:
    """Return a remark if a saved adapter was not trained on this base, or may not have been; else None.

    `fingerprint` is the base's. A run folder around the adapter has the fingerprint of its base; otherwise the model
    that PEFT's file names is compared.
    """
    manifest = _manifest_around(folder)
    if manifest:
        trained_on, name = manifest["identity"].get("model"), (manifest.get("model") or {}).get("name", "a model")
    else:
        name = read_object(folder / "adapter_config.json").get("base_model_name_or_path") or "no model"
        if name in (source.name, reference_to(source.folder)):
            return None  # named alike, and nothing else is known of it
        there = local_folder(name)
        if there is None:
            return (
                f"adapter={folder} names {name} as its base, which is not on this machine: whether it is "
                f"{source.name} is not known."
            )
        if there.resolve() == source.folder.resolve():
            return None
        trained_on = Source(name, there, "").fingerprint()
    if trained_on in (fingerprint, source.fingerprint(), source.fingerprint(code=True)):
        return None
    return f"adapter={folder} was trained on another base ({name}): config, tokenizer or weights are not this model's."


def foreign_checkpoint(folder: Path, identity: dict[str, Any]) -> str | None:
    """Return a remark if a checkpoint is of a run with another base, other data or settings; else None."""
    manifest = _manifest_around(folder)
    if manifest is None:
        return f"resume={folder}: the run that it is of is not known ({MANIFEST} is not beside it)."
    found = differences(manifest["identity"], scrub(json.loads(json.dumps(identity))))
    found.sort(key=lambda text: ": " in text)  # base and data before settings
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return f"resume={folder} is of another run: {'; '.join(found[:NAMED])}{more}." if found else None


def _manifest_around(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of the run whose folder is this one or holds it (`final/`, `checkpoints/step-N`)."""
    for place in (folder, *folder.absolute().parents[:2]):
        manifest = read_object(place / MANIFEST)
        if isinstance(manifest.get("identity"), dict):
            return manifest
    return None
