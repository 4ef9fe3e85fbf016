"""What the GPU tests share: when they run, models of random weights, and what runs leave behind.

`SFTX_GPU_DRY_RUN=1 python -m pytest -m gpu` runs them on a CPU, as far as that is possible: it tries the tests.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from sftx.training.saving.metrics import read_metrics

DRY_RUN = os.environ.get("SFTX_GPU_DRY_RUN") == "1"
DEVICE = torch.device("cpu" if DRY_RUN else "cuda")
ON_A_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (DRY_RUN or torch.cuda.is_available()), reason="torch sees no NVIDIA GPU"),
]
NOT_DRY = pytest.mark.skipif(DRY_RUN, reason="needs the GPU itself")
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


def losses(config: Any, key: str = "train/loss") -> list[float]:
    """Return a metric's values."""
    return [r[key] for r in read_metrics(Path(config.output_dir) / "metrics.jsonl") if key in r]


def manifest(config: Any) -> dict[str, Any]:
    """Return a run's manifest."""
    found: dict[str, Any] = json.loads((Path(config.output_dir) / "manifest.json").read_text())
    return found


def settings_of(config: Any) -> dict[str, Any]:
    """Return the effective settings."""
    found: dict[str, Any] = manifest(config)["effective"]["settings"]
    return found


def fallbacks_of(config: Any, key: str) -> list[dict[str, Any]]:
    """Return the fallbacks of a key."""
    return [f for f in manifest(config)["effective"]["fallbacks"] if f["key"] == key]


def random_model(folder: Path, dtype: torch.dtype, *, final_norm: float = 1.0, **shape: int) -> str:
    """Save a Qwen2 of random weights with the embedded model's tokenizer; return its folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

    from sftx.model.loading.builtin import ensure_builtin

    tokenizer = AutoTokenizer.from_pretrained(ensure_builtin())
    tokenizer.save_pretrained(folder)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = Qwen2Config(vocab_size=len(tokenizer), max_position_embeddings=4096, **ids, **shape)
    torch.manual_seed(0)
    with DEVICE:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        model.model.norm.weight.fill_(final_norm)
    model.save_pretrained(folder)
    return str(folder)
