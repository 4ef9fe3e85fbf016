"""Which GPU a rank takes, and what is said of one that cannot be used. The GPUs are imitated."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from sftx.errors import ConfigError
from sftx.parallel import supervised
from sftx.parallel.ddp import leave_out_peer_access
from sftx.parallel.device import choose_device
from sftx.parallel.settings import Single

WHEEL = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that imitates GPUs: their number and compute capability, and what torch was compiled for."""

    def imitate(number: int, capability: tuple[int, int] = (9, 0), compiled: list[str] = WHEEL) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100")
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: compiled)

    for name in ("TORCHELASTIC_RUN_ID", "NCCL_P2P_DISABLE", "NCCL_IB_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    return imitate


def test_each_rank_takes_its_own(gpus) -> None:
    gpus(4)
    assert [choose_device("auto", rank).index for rank in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ConfigError, match=r"torch sees 4 GPUs, and each needs its own"):
        choose_device("auto", 4)


def test_a_task_that_sees_only_its_own_gpu_takes_that(gpus) -> None:
    """`srun --gpus-per-task=1`: LOCAL_RANK is 3, and the only visible device is cuda:0."""
    gpus(1)
    assert choose_device("auto", 3) == torch.device("cuda", 0)


def test_ranks_that_see_one_gpu_together_are_refused(gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(1)
    refused = pytest.raises(ConfigError, match=r"torch sees 1 GPUs, and each needs its own")
    with monkeypatch.context() as torchrun, refused:
        torchrun.setenv("TORCHELASTIC_RUN_ID", "none")
        assert choose_device("auto", 0) == torch.device("cuda", 0)
        choose_device("auto", 1)
    monkeypatch.setattr(supervised, "current", object())
    with refused:
        choose_device("auto", 1)


@pytest.mark.parametrize(
    ("capability", "compiled", "runs"),
    [
        ((7, 0), WHEEL, False),  # V100
        ((7, 5), WHEEL, True),  # T4
        ((8, 9), WHEEL, True),  # 8.6's code
        ((12, 1), WHEEL, True),
        ((15, 0), WHEEL, True),  # by PTX
        ((15, 0), ["sm_90"], False),
        ((9, 0), ["sm_90a"], True),
        ((9, 1), ["sm_90a"], False),
        ((10, 3), ["sm_100f"], True),
        ((7, 0), [], True),  # unknown
    ],
)
def test_a_gpu_that_torch_has_no_kernels_for_is_refused(gpus, capability, compiled, runs: bool) -> None:
    gpus(1, capability, compiled)
    if runs:
        assert choose_device("auto", 0) == torch.device("cuda", 0)
        return
    with pytest.raises(ConfigError, match=r"Tesla V100 has compute capability .* TORCH_INDEX=") as refused:
        choose_device("cuda", 0)
    assert ", ".join(compiled) in str(refused.value)
    assert choose_device("cpu", 0) == torch.device("cpu")


def test_a_single_process_on_many_gpus_says_so(gpus) -> None:
    gpus(8)
    assert Single().start("auto").remarks == ["parallel=single: trains on 1 of 8 GPUs; parallel=ddp trains on all"]
    assert not Single().start("cpu").remarks
    gpus(1)
    assert not Single().start("auto").remarks


def test_gpus_without_peer_access_get_what_nccl_needs(gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two RTX 4090 with an old driver: Accelerate's PartialState raises NotImplementedError without both variables."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr("accelerate.utils.check_cuda_p2p_ib_support", lambda: False)
    monkeypatch.setenv("NCCL_IB_DISABLE", "0")
    assert leave_out_peer_access() == ["NCCL_P2P_DISABLE=1: GPUs with this driver cannot exchange data directly"]
    assert (os.environ["NCCL_P2P_DISABLE"], os.environ["NCCL_IB_DISABLE"]) == ("1", "0")
    assert leave_out_peer_access() == []
    monkeypatch.delenv("NCCL_P2P_DISABLE")
    monkeypatch.setattr("accelerate.utils.check_cuda_p2p_ib_support", lambda: True)
    assert leave_out_peer_access() == []
    assert "NCCL_P2P_DISABLE" not in os.environ
