"""Find a model's folder by its name: a path, or a hub id in the local caches; downloads nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def local_folder(name: str) -> Path | None:
    """Return the folder of a model that is on this machine, or None.

    Looks at the path itself, then in the Hugging Face cache, then in ModelScope's. What a cache holds
    only in part, after a download that stopped, is not there: a download goes on with it.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if name.count("/") != 1:
        return None
    owner, repo = name.split("/")
    return next((f for f in [*_hub(owner, repo), *_modelscope(owner, repo)] if not missing_files(f)), None)


def brings_template(name: str) -> bool:
    """Return True if a model is known to bring a chat template: the embedded one, or a folder on this machine."""
    if name == "qwen-tiny":
        return True
    folder = local_folder(name)
    if folder is None:
        return False
    if (folder / "chat_template.jinja").is_file():
        return True
    try:
        return bool(json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False


def reference_to(folder: Path) -> str:
    """Return a name by which others load this folder's model, wherever they run: its hub id, or its absolute path."""
    cached = folder.absolute().parents
    if len(cached) > 1 and cached[0].name == "snapshots" and cached[1].name.startswith("models--"):
        return cached[1].name.removeprefix("models--").replace("--", "/", 1)
    return str(folder.absolute())


def missing_files(folder: Path) -> list[str]:
    """Return the files without which a folder is no model: its config, its weights, each shard of them."""
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    there = {p.name for p in weight_files(folder)}
    whole = ("model.safetensors", "pytorch_model.bin")
    for index in (folder / f"{name}.index.json" for name in whole if not there & set(whole)):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError):
            continue  # no index, or one that transformers will explain
        return missing + sorted(shards - there)
    return missing if there else [*missing, WEIGHTS[0]]


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold a model's weights; an adapter's are not among them."""
    found = sorted(p for pattern in WEIGHTS for p in folder.glob(pattern) if p.is_file())
    return [p for p in found if not p.name.startswith("adapter_")]


def _hub(owner: str, repo: str) -> list[Path]:
    """Return the snapshots in the Hugging Face cache: first the one that `main` names, then the newest."""
    home = _folder("HF_HOME") or (_folder("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    model = (_folder("HF_HUB_CACHE") or home / "hub") / f"models--{owner}--{repo}"
    snapshots = sorted((model / "snapshots").glob("*"), key=lambda p: p.stat().st_mtime, reverse=True)
    main = model / "refs" / "main"
    named = main.read_text(encoding="utf-8").strip() if main.is_file() else ""
    return sorted(snapshots, key=lambda p: p.name != named)


def _modelscope(owner: str, repo: str) -> list[Path]:
    """Return the folders where ModelScope's releases have put a model; some write a dot as `___`."""
    root = _folder("MODELSCOPE_CACHE") or Path.home() / ".cache" / "modelscope"
    roots = [root / "models", root / "hub" / "models", root / "hub", root]
    return [r / owner / n for r in roots for n in dict.fromkeys((repo, repo.replace(".", "___")))]


def _folder(variable: str) -> Path | None:
    """Return the folder that an environment variable names."""
    return Path(os.environ[variable]).expanduser() if os.environ.get(variable) else None
