"""Shared by the fault tests: the process that forks runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.faults.kill import Zygote


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    made = Zygote(tmp_path_factory.mktemp("zygote-cache"))
    yield made
    made.close()
