"""Data parallel: gloo on CPU, NCCL on GPUs; group `parallel`, option `ddp`.

Every rank holds the whole model and trains on its share of each step's micro-batches. Gradients are
summed over ranks once per optimizer step, in buckets: the same sum as DistributedDataParallel with
`no_sync`, but it knows nothing of a forward pass, so several adapters can be trained on one base and
a rank without rows left simply adds nothing. Accelerate sets the processes up.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from sftx import train_command
from sftx.errors import ConfigError
from sftx.parallel import supervised
from sftx.parallel.engine import Engine
from sftx.parallel.stepper import Stepper

if TYPE_CHECKING:
    from sftx.model.adapt import AdaptedModel, Adapter

BUCKET_ELEMENTS = 25 * 2**20
"""Gradients exchanged in one message (100 MB of fp32)."""
LATER = datetime.timedelta(seconds=60)


def refuse_alone(option: str, requested: int | None) -> None:
    """Raise if a process that was not started as a rank should be one of several.

    Raises:
        ConfigError: it should.
    """
    if requested is not None and requested > 1:
        raise ConfigError(
            f"`parallel.num_processes={requested}`: this process trains alone. {train_command()} parallel={option} "
            f"starts {requested} processes; in a program of your own, use parallel=single."
        )


def join(device: torch.device, timeout_seconds: int) -> list[str]:
    """Join the process group, however the ranks were started; return remarks on how it was set up."""
    from accelerate import PartialState

    remarks = leave_out_peer_access() if device.type == "cuda" else []
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    group: dict[str, Any] = {"timeout": datetime.timedelta(seconds=timeout_seconds)}
    with supervised.collective():
        if supervised.current is not None:
            # The supervisor, which can name the rank that others wait for, is to be the first to lose patience.
            group["timeout"] += LATER
            store = dist.TCPStore(
                os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world_size, rank == 0,
                group["timeout"], master_listen_fd=supervised.current.rendezvous,
            )  # fmt: skip
            group |= {"store": store, "rank": rank, "world_size": world_size}
        PartialState(cpu=device.type == "cpu", **group)
    return remarks


def leave_out_peer_access() -> list[str]:
    """Set what NCCL needs on GPUs that cannot exchange data directly, as `accelerate launch` does; return a remark.

    These are RTX 40xx with an old driver; Accelerate refuses to start without these variables.
    """
    from accelerate.utils import check_cuda_p2p_ib_support

    missing = [name for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE") if name not in os.environ]
    if not missing or check_cuda_p2p_ib_support():
        return []
    os.environ |= dict.fromkeys(missing, "1")
    return [f"{', '.join(f'{name}=1' for name in missing)}: GPUs with this driver cannot exchange data directly"]


def check_complete(option: str) -> None:
    """Raise if the process group does not hold every rank that was started: Accelerate once fell back to one.

    Raises:
        ConfigError: ranks are missing.
    """
    started = os.environ["WORLD_SIZE"]
    if dist.get_world_size() != int(started):
        raise ConfigError(f"`parallel={option}`: {dist.get_world_size()} ranks joined, {started} were started.")


class DdpEngine(Engine):
    """One rank of several, each with the whole model."""

    defers_loss = False  # ranks agree on a step's result before the next one

    def __init__(self, device: torch.device, remarks: Sequence[str] = ()) -> None:
        super().__init__(device, remarks)
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    def stepper(
        self, model: AdaptedModel, adapter: Adapter, optimizer: Optimizer, dtype: torch.dtype, max_grad_norm: float
    ) -> Stepper:
        """Return the stepper of replicated parameters, whose gradients are summed over ranks."""
        return Stepper(adapter.parameters, optimizer, dtype, max_grad_norm, self.sum_gradients, self.is_main)

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sum gradients over ranks, a bucket at a time; a rank without a gradient adds zeros."""
        bucket: list[torch.Tensor] = []
        size = 0
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            bucket.append(parameter.grad)
            size += parameter.grad.numel()
            if size >= BUCKET_ELEMENTS:
                _sum_bucket(bucket)
                bucket, size = [], 0
        _sum_bucket(bucket)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor summed over ranks."""
        total = tensor.clone()
        with supervised.collective():
            dist.all_reduce(total)
        return total

    def from_main(self, value: Any) -> Any:
        """Return rank 0's value."""
        box = [value]
        with supervised.collective(for_main=True):
            dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        with supervised.collective(for_main=True):
            dist.barrier()

    def close(self, *, together: bool) -> None:
        """Leave the process group; a rank that failed waits for no other."""
        if together:
            self.barrier()
            dist.destroy_process_group()


def _sum_bucket(bucket: list[torch.Tensor]) -> None:
    if not bucket:
        return
    flat = torch.cat([g.flatten() for g in bucket])
    with supervised.collective():
        dist.all_reduce(flat)
    for gradient, piece in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
        gradient.copy_(piece.view_as(gradient))
