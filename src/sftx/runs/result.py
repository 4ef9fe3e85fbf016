"""The outcome of a trial."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sftx.errors import SftxError


@dataclass(frozen=True)
class Result:
    """The outcome of a trial that reached its end."""

    output_dir: Path
    steps: int
    eval_loss_before: float | None
    eval_loss: float | None
    stop_reason: str | None

    @property
    def objective(self) -> float | None:
        """What a sweep minimises."""
        return self.eval_loss

    def plain(self) -> dict[str, Any]:
        """Return it as plain data, which `Result.of` reads."""
        return asdict(self) | {"output_dir": str(self.output_dir)}

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Result:
        """Return the result that `plain` described."""
        return cls(**plain | {"output_dir": Path(plain["output_dir"])})


@dataclass(frozen=True)
class Failure:
    """The outcome of a trial that failed while others of its call went on."""

    output_dir: Path
    steps: int
    error: SftxError


Results = list[Result | Failure]
"""One for each trial of a call, in the order of its configurations."""


def single(results: Results) -> Result:
    """Return the result of a call with one configuration, whose failure would have been raised."""
    (result,) = results
    assert isinstance(result, Result)
    return result
