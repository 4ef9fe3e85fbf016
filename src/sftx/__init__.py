"""sftx: supervised fine-tuning of Qwen-like language models, configured by Hydra."""

import sys
from pathlib import Path

__version__ = "0.1.0"

_PACKAGE = Path(__file__).resolve().parent
INSTALLED = (_PACKAGE / "conf").is_dir()
"""True if sftx was installed from a wheel, which holds the folders below; False in a checkout."""
PROJECT_ROOT = _PACKAGE if INSTALLED else _PACKAGE.parents[1]
"""The folder of `conf/`, `sweeps/` and `launchers/`: the checkout, or the installed package."""
EMBEDDED_DATA = PROJECT_ROOT / ("embedded" if INSTALLED else "data")
"""The embedded corpus. In a wheel it has another name, because `sftx.data` is a package."""


def train_command() -> str:
    """Return how training is started here: `sftx train`, or `python train.py` in a checkout."""
    program = Path(sys.argv[0])
    by_entry_point = program.name == "sftx" or program.resolve() == _PACKAGE / "__main__.py"
    return "sftx train" if INSTALLED or by_entry_point else "python train.py"
