"""ZeRO-3 (arXiv:1910.02054) by DeepSpeed: parameters, gradients and optimizer split over ranks; option `zero3`.

Loss, gradient norm and weights equal those of one process. What is saved is unsharded and in the
same files as any other run's, so a run may be resumed on another number of ranks.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from sftx.errors import ConfigError, TrainingError
from sftx.parallel import supervised
from sftx.parallel.ddp import DdpEngine
from sftx.parallel.stepper import Regularizer, Stepper, Weights

if TYPE_CHECKING:
    from sftx.model.adapt import AdaptedModel, Adapter
    from sftx.parallel.settings import Zero3

NO_OVERFLOW = "Use bf16=true, or precision=fp32."
MASTER = "master"
"""State key of the fp32 copy of a half-precision parameter."""
STEP = "step"
"""State key of AdamW's counter: one value for all parameters."""


def group_of_one() -> dict[str, str]:
    """Return torchrun's variables for a process that is alone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {k: str(v) for k, v in alone.items()}


class Zero3Engine(DdpEngine):
    """One rank of several that hold a part of the model each."""

    sharded = True

    def __init__(self, device: torch.device, settings: Zero3, remarks: Sequence[str] = ()) -> None:
        super().__init__(device, remarks)
        self.settings = settings
        self.trained: Any = None

    def config(self, dtype: torch.dtype, max_grad_norm: float = 0.0) -> dict[str, Any]:
        """Return DeepSpeed's configuration; the loop owns accumulation, batches and the schedule."""
        offload = {"device": "cpu", "pin_memory": self.device.type == "cuda"}
        zero: dict[str, Any] = {
            "stage": 3,
            "reduce_bucket_size": self.settings.bucket_elements,
            "contiguous_gradients": True,
        }
        if self.settings.offload_parameters:
            zero["offload_param"] = offload
        if self.settings.offload_optimizer:
            zero["offload_optimizer"] = offload
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": max_grad_norm,
            "zero_optimization": zero,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "fp16": {"enabled": dtype == torch.float16},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**31,
        }

    @contextmanager
    def loading(self, dtype: torch.dtype) -> Iterator[None]:
        """Let transformers split each weight as it reads it: no rank ever holds the whole model."""
        from transformers.integrations import HfDeepSpeedConfig

        held = HfDeepSpeedConfig(self.config(dtype))  # transformers keeps a weak reference only
        yield
        del held

    def stepper(
        self, model: AdaptedModel, adapter: Adapter, optimizer: Optimizer, dtype: torch.dtype, max_grad_norm: float
    ) -> Stepper:
        """Let DeepSpeed split what is trained.

        Raises:
            ConfigError: there is a trial already: DeepSpeed trains one set of parameters a process.
        """
        import deepspeed

        if self.trained is not None:
            raise ConfigError("`parallel=zero3` trains one trial at a time: use parallel=ddp for several on one base.")
        self.trained, *_ = deepspeed.initialize(
            model=model.network,
            optimizer=optimizer,
            config=self.config(dtype, max_grad_norm),
            dist_init_required=False,
        )
        trained = self.trained

        def forward(*arguments: Any, **named: Any) -> Any:
            with supervised.collective():  # each layer's parameters are gathered from all ranks
                return trained(*arguments, **named)

        model.call_through(forward)
        return Zero3Stepper(self, self.trained, adapter.parameters, optimizer)

    def close(self, *, together: bool) -> None:
        """Leave the process group; a rank that failed waits for no other."""
        if self.trained is not None and together:
            self.trained.destroy()
        super().close(together=together)


class Zero3Stepper(Stepper):
    """Steps what DeepSpeed has split; see `Stepper`."""

    masks = False

    def __init__(
        self, engine: Zero3Engine, trained: Any, parameters: Mapping[str, torch.nn.Parameter], optimizer: Optimizer
    ) -> None:
        self.engine, self.trained, self.parameters, self.optimizer = engine, trained, dict(parameters), optimizer
        self.regularizers: list[Regularizer] = []

    @property
    def scales_loss(self) -> bool:
        """True if DeepSpeed trains in fp16."""
        return bool(self.trained.fp16_enabled())

    @property
    def loss_scale(self) -> float | None:
        """The factor of DeepSpeed's fp16."""
        return float(self.trained.optimizer.loss_scale) if self.trained.fp16_enabled() else None

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add and split the gradients; DeepSpeed's mean over ranks is made the sum that the loop wants."""
        self.trained.set_gradient_accumulation_boundary(last)
        with supervised.collective():
            self.trained.backward(loss * self.engine.world_size, scale_wrt_gas=False)

    def step(self, learning_rate: float, *, apply: bool | torch.Tensor = True) -> torch.Tensor:
        """Clip and step; DeepSpeed skips a step whose gradient is not finite.

        Raises:
            TrainingError: the loss scale cannot be lowered any further, or there is a regularizer.
        """
        if self.regularizers:
            raise TrainingError("`parallel=zero3` splits gradients as they arise: it takes no regularizers. Use ddp.")
        if not apply:
            self.discard()
            return torch.tensor(math.nan)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        skipped = self.trained.skipped_steps
        with supervised.collective():
            try:
                self.trained.step()
            except Exception as error:
                if "minimum" not in str(error):  # DeepSpeed raises a plain Exception
                    raise
                raise TrainingError(f"the gradient overflows fp16 at every loss scale. {NO_OVERFLOW}") from error
        if self.trained.skipped_steps > skipped:
            return torch.tensor(math.nan)
        return torch.as_tensor(self.trained.get_global_grad_norm())

    def discard(self) -> None:
        """Forget the gradients; the next ones replace those that DeepSpeed has split already."""
        self.trained.optimizer.zero_grad()

    def weights(self) -> Weights:
        """Gather the trained parameters one after the other."""
        import deepspeed

        out: Weights = {}
        for name, parameter in self.parameters.items():
            with supervised.collective(), deepspeed.zero.GatheredParameters([parameter]):
                if self.engine.is_main:
                    out[name] = parameter.detach().cpu().clone()
        return out

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Set the trained parameters and their fp32 copies."""
        import deepspeed

        for name, parameter in self.parameters.items():
            with supervised.collective(), deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if self.engine.is_main:
                    parameter.copy_(weights[name])
            self._set_own_part(parameter, weights[name])

    def state(self) -> tuple[Weights, dict[str, Any]]:
        """Gather the optimizer's state and the fp32 copies one parameter after the other."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        out: Weights = {}
        first: Mapping[str, Any] = next(iter(self.optimizer.state.values()), {})
        split = sorted(k for k, v in first.items() if isinstance(v, torch.Tensor) and v.ndim > 0)  # alike on all ranks
        for name, parameter in self.parameters.items():
            with supervised.collective():
                full = {k: safe_get_full_optimizer_state(parameter, k) for k in split}
            if STEP in first:
                full[STEP] = first[STEP]
            if parameter.dtype != torch.float32:
                full[MASTER] = safe_get_full_fp32_param(parameter)
            if self.engine.is_main:
                out |= {f"{name}|{k}": v.detach().cpu().clone() for k, v in full.items()}
        return out, {"scalars": {}, "zero_scaler": self._scaler_numbers()}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, torch.Tensor], rest: Mapping[str, Any]) -> None:
        """Give every rank its part of the optimizer's state."""
        shared = {k.rpartition("|")[2]: t for k, t in tensors.items() if t.ndim == 0}
        split = {k.rpartition("|")[2] for k, t in tensors.items() if t.ndim > 0} - {MASTER}
        for flat in self.trained.optimizer.fp32_partitioned_groups_flat:  # empty before the first step
            self.optimizer.state[flat] = {k: t.clone() for k, t in shared.items()}
            self.optimizer.state[flat] |= {k: torch.zeros_like(flat) for k in split}
        for name, parameter in self.parameters.items():
            for key in split:
                self._set_own_part(parameter, tensors[f"{name}|{key}"], key)
            if f"{name}|{MASTER}" in tensors:
                self._set_own_part(parameter, tensors[f"{name}|{MASTER}"])
        if self.trained.fp16_enabled():
            vars(self.trained.optimizer.loss_scaler).update(rest.get("zero_scaler", {}))

    def _scaler_numbers(self) -> dict[str, float]:
        if not self.trained.fp16_enabled():
            return {}
        return {k: v for k, v in vars(self.trained.optimizer.loss_scaler).items() if isinstance(v, int | float)}

    def _set_own_part(self, parameter: Any, full: torch.Tensor, key: str | None = None) -> None:
        """Set this rank's part of a state, or of the fp32 copy; the last part is padded."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        size = parameter.ds_tensor.numel()
        start = size * self.engine.rank
        part = torch.zeros(size)
        own = full.flatten()[start : start + size].float()
        part[: own.numel()] = own
        if key is None:
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_local_optimizer_state(parameter, part, key)
