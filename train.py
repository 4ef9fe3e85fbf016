"""Fine-tune a model: `python train.py mode=qlora lora_rank=32`; every key: `python train.py --help`.

The program itself is `sftx train`, in src/sftx/commands/train.py.
"""

import sys

from sftx.commands.train import main, start

__all__ = ["main"]

if __name__ == "__main__":
    start(sys.argv[1:])
