"""The settings of group `parallel`: how many processes train, and how long they wait for each other.

torch is imported when an engine is started, not when its settings are checked.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from sftx.config.bounds import Bounds
from sftx.errors import ConfigError

if TYPE_CHECKING:
    from sftx.parallel.engine import Engine


@dataclass(frozen=True)
class Single:
    """Trains alone."""

    def start(self, device: str) -> Engine:
        """Return the engine of the only rank."""
        import torch

        from sftx.parallel.device import choose_device
        from sftx.parallel.engine import Engine

        chosen = choose_device(device, 0)
        gpus = torch.cuda.device_count() if chosen.type == "cuda" else 1
        unused = [f"parallel=single: trains on 1 of {gpus} GPUs; parallel=ddp trains on all"] if gpus > 1 else []
        return Engine(chosen, unused)


@dataclass(frozen=True)
class Ddp:
    """Several processes, one device each; `num_processes` are started on this machine, null: one for each GPU.

    `hang_seconds`: how long the others wait for a rank that does nothing; `timeout_seconds`: for one that works.
    """

    num_processes: Annotated[int | None, Bounds(at_least=1, at_most=1024)]
    hang_seconds: Annotated[int | None, Bounds(at_least=1, at_most=31_536_000)]
    timeout_seconds: Annotated[int, Bounds(at_least=1, at_most=31_536_000)]

    def start(self, device: str) -> Engine:
        """Join the other ranks, if there are any.

        Raises:
            ConfigError: there should be several, and this process is alone.
        """
        from sftx.parallel.ddp import DdpEngine, check_complete, join, refuse_alone
        from sftx.parallel.device import choose_device
        from sftx.parallel.engine import Engine

        if "RANK" not in os.environ:
            refuse_alone("ddp", self.num_processes)
            return Engine(choose_device(device, 0))
        local = choose_device(device, int(os.environ["LOCAL_RANK"]))
        if os.environ["WORLD_SIZE"] == "1":
            return Engine(local)
        remarks = join(local, self.timeout_seconds)
        check_complete("ddp")
        return DdpEngine(local, remarks)


@dataclass(frozen=True)
class Zero3:
    """Several processes that share one model; `offload_*` keep what a GPU has no room for in host memory.

    The other settings are those of `Ddp`.
    """

    num_processes: Annotated[int | None, Bounds(at_least=1, at_most=1024)]
    offload_parameters: bool
    offload_optimizer: bool
    bucket_elements: Annotated[int, Bounds(at_least=1)]
    hang_seconds: Annotated[int | None, Bounds(at_least=1, at_most=31_536_000)]
    timeout_seconds: Annotated[int, Bounds(at_least=1, at_most=31_536_000)]

    def start(self, device: str) -> Engine:
        """Join the other ranks, or be a group of one.

        Raises:
            ConfigError: DeepSpeed is not installed, or ranks are missing.
        """
        from sftx.parallel.ddp import check_complete, join, refuse_alone
        from sftx.parallel.device import choose_device
        from sftx.parallel.zero import Zero3Engine, group_of_one

        local = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
        os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")  # its kernels are not used: torch's optimizers are
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        try:
            import deepspeed
        except ImportError as error:
            raise ConfigError("`parallel=zero3` needs DeepSpeed: pip install -c constraints.txt deepspeed.") from error
        if "RANK" not in os.environ:
            refuse_alone("zero3", self.num_processes)
            os.environ.update(group_of_one())
        if local.type == "cuda":
            os.environ["LOCAL_RANK"] = str(local.index)  # DeepSpeed takes it for the number of the GPU
        remarks = join(local, self.timeout_seconds)
        deepspeed.init_distributed(dist_backend="gloo" if local.type == "cpu" else "nccl", verbose=False)
        check_complete("zero3")
        return Zero3Engine(local, self, remarks)
