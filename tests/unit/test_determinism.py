"""`deterministic=true`: kernels that give the same bits each time on a GPU; a CPU needs none of it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch

from sftx.config.derive import differences, identity
from sftx.errors import ConfigError
from sftx.run import run
from sftx.training.determinism import CUBLAS, deterministic_kernels
from sftx.training.saving.metrics import read_metrics

COMPARED = ("step", "train/loss", "train/grad_norm", "eval/loss")


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CUBLAS, raising=False)


def test_it_is_on_while_asked_for_and_off_again() -> None:
    with deterministic_kernels(requested=True):
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ[CUBLAS] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()
    assert CUBLAS not in os.environ
    with deterministic_kernels(requested=False):
        assert not torch.are_deterministic_algorithms_enabled()
        assert CUBLAS not in os.environ


@pytest.mark.parametrize(("set_to", "used"), [(":16:8", ":16:8"), (":4096:2:16:8", ":4096:8")])
def test_a_users_own_workspace_is_kept_if_it_is_reproducible(monkeypatch, set_to: str, used: str) -> None:
    monkeypatch.setenv(CUBLAS, set_to)
    with deterministic_kernels(requested=True):
        assert os.environ[CUBLAS] == used
    assert os.environ[CUBLAS] == set_to


def test_it_is_off_again_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), deterministic_kernels(requested=True):
        raise ZeroDivisionError
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_operation_without_a_deterministic_kernel_is_named() -> None:
    with pytest.raises(ConfigError, match=r"deterministic=true.*aten::kthvalue.*deterministic=false"), \
            deterministic_kernels(requested=True):  # fmt: skip
        raise RuntimeError("aten::kthvalue does not have a deterministic implementation, but you set 'torch.use_...'")
    with pytest.raises(RuntimeError, match="another"), deterministic_kernels(requested=True):
        raise RuntimeError("another")


def test_it_is_on_before_the_device_is_looked_at(make_config, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA starts in the engine, of each rank too: cuBLAS reads its variable then."""
    found = []

    def start(self: object, device: str) -> None:
        found.append((torch.are_deterministic_algorithms_enabled(), os.environ.get(CUBLAS)))
        raise ConfigError("far enough")

    monkeypatch.setattr("sftx.parallel.settings.Single.start", start)
    for typed in ("true", "false"):
        with pytest.raises(ConfigError, match="far enough"):
            run([make_config(f"deterministic={typed}")])
    assert found == [(True, ":4096:8"), (False, None)]


def test_on_a_cpu_it_changes_no_bit(make_config, captured, one_thread: None) -> None:
    found = []
    for typed in ("false", "true"):
        config = make_config(f"deterministic={typed}", "lora_dropout=0.1", "max_steps=2", output=typed)
        run([config])
        settings = captured.trial.effective.settings
        assert settings["deterministic"] is (typed == "true")
        folder = Path(config.output_dir)
        records = [[r.get(k) for k in COMPARED] for r in read_metrics(folder / "metrics.jsonl")]
        weights = (folder / "final" / "adapter_model.safetensors").read_bytes()
        found.append((records, hashlib.sha256(weights).hexdigest()))
    assert len(found[0][0]) > 2
    assert found[0] == found[1]


def test_a_run_may_be_continued_with_it(make_config) -> None:
    """It is no more of a run's identity than `device`: both only change how sums are rounded."""
    one, other = (identity(make_config(f"deterministic={typed}"), 1, [], "", None) for typed in ("false", "true"))
    assert not differences(one, other)
