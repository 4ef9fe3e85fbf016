"""Imports that cost no more than what a run uses of them."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def import_peft() -> None:
    """Import PEFT, and bitsandbytes with it, without TorchInductor: a third of the start of a run.

    bitsandbytes decorates functions with `torch.compile`, which imports the compiler when it decorates.
    """
    if "peft" not in sys.modules:
        with _compiling_later():
            importlib.import_module("peft")


@contextmanager
def _compiling_later() -> Iterator[None]:
    """Let `torch.compile` do nothing until what it returned is called."""
    compile_now = torch.compile

    def compile_later(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
        if function is None:
            return functools.partial(compile_later, **options)

        @functools.cache
        def compiled() -> Callable[..., Any]:
            return compile_now(function, **options)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return compiled()(*args, **kwargs)

        return call

    torch.compile = compile_later  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_now
