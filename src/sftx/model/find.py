"""Find a model's folder by its name: a path, or a hub id in the local caches; downloads nothing."""

from __future__ import annotations

import os
from pathlib import Path


def local_folder(name: str) -> Path | None:
    """Return the folder of a model that is on this machine, or None.

    Looks at the path itself, then in the Hugging Face cache, then in ModelScope's.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if name.count("/") != 1:
        return None
    owner, repo = name.split("/")
    hub = Path(os.environ.get("HF_HUB_CACHE") or _home("HF_HOME", ".cache/huggingface") / "hub")
    snapshots = hub / f"models--{owner}--{repo}" / "snapshots"
    for folder in sorted(snapshots.glob("*"), key=lambda p: p.stat().st_mtime, reverse=True):
        if (folder / "config.json").is_file():
            return folder
    scope = Path(os.environ.get("MODELSCOPE_CACHE") or _home("MODELSCOPE_HOME", ".cache/modelscope") / "hub")
    for folder in (scope / "models" / owner / repo, scope / owner / repo, scope / owner / repo.replace(".", "___")):
        if (folder / "config.json").is_file():
            return folder
    return None


def _home(variable: str, default: str) -> Path:
    return Path(os.environ[variable]) if variable in os.environ else Path.home() / default
