"""Shared by the fault tests: the process that forks runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.faults.kill import Zygote


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    made = Zygote()
    yield made
    made.close()
