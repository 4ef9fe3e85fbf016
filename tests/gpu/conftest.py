"""A dry run: the GPU tests on a CPU that computes in half precision and reads losses late, as a GPU does."""

from __future__ import annotations

import pytest
from tests.gpu.cases import DEVICE, DRY_RUN, HALF

from sftx.parallel.engine import Engine
from sftx.training.precision import Numerics, Precision


@pytest.fixture(autouse=True)
def _dry_run(monkeypatch: pytest.MonkeyPatch) -> None:
    if not DRY_RUN:
        return
    resolve = Precision.resolve

    def half(self: Precision, device, effective, **settings) -> Numerics:  # type: ignore[no-untyped-def]
        dtype = {"float16": HALF["fp16"], "bfloat16": HALF["bf16"]}.get(self.dtype)
        return Numerics(dtype, DEVICE) if dtype else resolve(self, device, effective, **settings)

    monkeypatch.setattr(Precision, "resolve", half)
    monkeypatch.setattr(Engine, "defers_loss", True)
