"""Data parallel under torchrun: gloo on CPU, NCCL on GPUs; group `parallel`, option `ddp`.

Every rank holds the whole model and trains on its share of each step's micro-batches. Gradients are
summed over ranks once per optimizer step, in buckets: the same sum as DistributedDataParallel with
`no_sync`, but it knows nothing of a forward pass, so several adapters can be trained on one base and
a rank without rows left simply adds nothing. Accelerate sets the processes up.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from sftx.errors import ConfigError
from sftx.parallel.engine import Engine, Stepper, choose_device
from sftx.parallel.whole import WholeStepper

if TYPE_CHECKING:
    from sftx.model.adapt import AdaptedModel, Adapter

BUCKET_ELEMENTS = 25 * 2**20
"""Gradients exchanged in one message (100 MB of fp32)."""


@dataclass(frozen=True)
class Ddp:
    """Several processes, one device each."""

    timeout_seconds: int

    def start(self, device: str) -> Engine:
        """Join the process group that torchrun started.

        Errors:
            ConfigError: the process was not started by torchrun.
        """
        if "RANK" not in os.environ:
            raise ConfigError(
                "`parallel=ddp`: this process was not started by torchrun. "
                "Type: torchrun --nproc_per_node 2 train.py parallel=ddp ..., or use parallel=single."
            )
        from accelerate import PartialState

        local = choose_device(device, int(os.environ["LOCAL_RANK"]))
        PartialState(cpu=local.type == "cpu", timeout=datetime.timedelta(seconds=self.timeout_seconds))
        if dist.get_world_size() != int(os.environ["WORLD_SIZE"]):  # Accelerate once fell back to one process
            raise ConfigError(
                f"`parallel=ddp`: {dist.get_world_size()} ranks joined, {os.environ['WORLD_SIZE']} were started."
            )
        return DdpEngine(local)


class DdpEngine:
    """One rank of several."""

    sharded = False

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    @property
    def is_main(self) -> bool:
        """True on rank 0."""
        return self.rank == 0

    def loading(self, dtype: torch.dtype) -> AbstractContextManager[object]:
        """Return a context that changes nothing: every rank holds the whole model."""
        return nullcontext()

    def stepper(
        self, model: AdaptedModel, adapter: Adapter, optimizer: Optimizer, dtype: torch.dtype, max_grad_norm: float
    ) -> Stepper:
        """Return the stepper of whole parameters, whose gradients are summed over ranks."""
        return WholeStepper(adapter.parameters, optimizer, dtype, max_grad_norm, self.sum_gradients, self.is_main)

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
        dist.all_reduce(total)
        return total

    def from_main(self, value: Any) -> Any:
        """Return rank 0's value."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()

    def close(self, *, together: bool) -> None:
        """Leave the process group; a rank that failed waits for no other."""
        if together:
            dist.barrier()
            dist.destroy_process_group()


def _sum_bucket(bucket: list[torch.Tensor]) -> None:
    if not bucket:
        return
    flat = torch.cat([g.flatten() for g in bucket])
    dist.all_reduce(flat)
    for gradient, piece in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
        gradient.copy_(piece.view_as(gradient))
