"""sftx: supervised fine-tuning of Qwen-like language models, configured by Hydra."""

from pathlib import Path

__version__ = "0.1.0"

PROJECT_ROOT = Path(__file__).resolve().parents[2]
"""The checkout that sftx runs from: it holds `conf/`, `sweeps/` and `data/`."""
