"""What is run: the base case, and cases that change one thing of it. Standard library only: no peer needs sftx."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Batching = Literal["fastest", "padded", "packed"]


@dataclass(frozen=True)
class Case:
    """The work of a run, the same for every trainer."""

    name: str
    factor: str
    """What it changes of the base case."""
    model: str = "small"
    mode: Literal["lora", "qlora", "full"] = "lora"
    batching: Batching = "fastest"
    """`fastest`: what makes this trainer fastest without changing what is learned."""
    checkpointing: bool = False
    rows: int = 32
    batch: int = 8
    accumulation: int = 1
    threads: int = 1
    rate: float = 2e-4
    steps: int = -1
    """Optimizer steps; -1: all of one epoch."""
    warm: bool = False
    """Whether the same run has been made before, with the same caches."""

    @property
    def prepares(self) -> bool:
        """Whether it is about data and start-up, not about training."""
        return self.steps > 0

    @property
    def check(self) -> Case:
        """The same with few rows and next to no rate: the mean loss of its epoch is that of the untrained model."""
        return replace(self, rows=8, rate=1e-12)

    def facts(self) -> dict[str, Any]:
        """Return what a child script must know, as JSON holds it."""
        return asdict(self)


BASE = Case("base", "base")


def _vary(name: str, factor: str, **changes: Any) -> Case:
    return replace(BASE, name=name, factor=factor, **changes)


CASES = {
    case.name: case
    for case in (
        BASE,
        _vary("padded", "batching", batching="padded"),
        _vary("packed", "batching", batching="packed"),
        _vary("threads-2", "threads", threads=2),
        _vary("qlora", "mode", mode="qlora"),
        _vary("full", "mode", mode="full"),
        _vary("checkpointing", "checkpointing", checkpointing=True),
        _vary("accumulation-4", "accumulation", batch=2, accumulation=4),
        _vary("tiny", "model", model="tiny", rows=128),
        _vary("smollm2", "model", model="smollm2", rows=8),
        _vary("start-warm", "data", steps=1, warm=True),
        _vary("data-2000", "data", rows=2000, steps=1),
        _vary("data-2000-warm", "data", rows=2000, steps=1, warm=True),
        _vary("data-100000", "data", rows=100_000, steps=1),
        _vary("data-100000-warm", "data", rows=100_000, steps=1, warm=True),
    )
}

PEERS = ("sftx", "trl", "llamafactory", "plain", "swift", "litgpt")
PACKAGES = {"trl": "trl", "llamafactory": "llamafactory", "plain": "peft", "swift": "ms-swift", "litgpt": "litgpt"}
"""The package of a peer whose version says which it is."""
FASTEST = {
    "sftx": "padding_free",
    "trl": "packed",
    "llamafactory": "packed",
    "plain": "length_bucketed",
    "swift": "length_bucketed",
    "litgpt": "padded",
}
"""The batching that makes a trainer fastest in the base case; all are exact, rows never see each other."""
CANNOT = {
    ("plain", "packed"): "transformers' Trainer has no packing",
    ("litgpt", "packed"): "litgpt's fine-tuning has no packing",
    ("litgpt", "checkpointing"): "litgpt has no checkpointing on one device",
}
"""The cases that a trainer has no setting for."""

LENGTH, RANK, ALPHA, CLIP, SEED = 1024, 16, 32, 1.0, 42
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
