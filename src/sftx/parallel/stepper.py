"""What makes the optimizer steps of one adapter.

The loop divides every micro-batch's summed loss by the tokens of the whole optimizer step, over all
ranks; gradients are therefore *summed* over ranks, never averaged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer
from torch.profiler import record_function

from sftx.errors import CheckpointError

Weights = dict[str, torch.Tensor]
Regularizer = Callable[[Mapping[str, torch.nn.Parameter]], None]
"""Adds to the gradients of parameters, which it is given by name."""
CLIP = "sftx: gradient norm and clipping"
"""Name of this part of a step in a profile."""
SumGradients = Callable[[Iterable[torch.nn.Parameter]], None]


def _nothing_to_sum(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Leave gradients as they are: one rank has the full sum."""


def _norm(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """Return the norm of all gradients as one vector, fp64: a sum of millions of fp32 squares is 3e-5 off on a CPU.

    A GPU sums in a tree, which is exact enough in fp32; a call for each parameter would cost more than the sum, and
    clipping by an fp64 norm makes one.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients and gradients[0].device.type == "cuda":
        return torch.nn.utils.get_total_norm(gradients, foreach=True)
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients]))


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy on the CPU that training does not change."""
    return tensor.detach().to("cpu", copy=True).contiguous()


class Stepper:
    """Makes the optimizer steps of one adapter, whose parameters are replicated: every rank holds all of them.

    Optimizer, loss scaler and clipping belong to the adapter, not to the run.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        optimizer: Optimizer,
        dtype: torch.dtype,
        max_grad_norm: float,
        sum_gradients: SumGradients = _nothing_to_sum,
        is_main: bool = True,
    ) -> None:
        self.is_main = is_main
        self.parameters, self.optimizer = dict(parameters), optimizer
        device = next(iter(self.parameters.values())).device.type
        self.scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
        self.scaler.scale(torch.zeros((), device=next(iter(self.parameters.values())).device))  # makes the scale
        self.max_grad_norm = max_grad_norm or math.inf
        self.regularizers: list[Regularizer] = []
        """Called at every step, after gradients were summed over ranks and before their norm is taken and clipped."""
        self.sum_gradients = sum_gradients
        self._kind = f"{type(optimizer).__module__.partition('.')[0]}.{type(optimizer).__name__}"

    @property
    def scales_loss(self) -> bool:
        """True if an fp16 loss scaler is in use: it lowers its factor after a gradient that is not finite."""
        return self.scaler.is_enabled()

    @property
    def loss_scale(self) -> float | None:
        """The factor that keeps fp16 gradients from vanishing; None without one."""
        return self.scaler.get_scale() if self.scaler.is_enabled() else None

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add the gradients of a micro-batch; `last` if a step follows."""
        self.scaler.scale(loss).backward()

    def _clipped(self, learning_rate: float) -> torch.Tensor:
        """Sum, unscale, regularize and clip the gradients, and set the lr; return their norm before clipping."""
        parameters = list(self.parameters.values())
        self.sum_gradients(parameters)
        self.scaler.unscale_(self.optimizer)
        for regularize in self.regularizers:
            regularize(self.parameters)
        with record_function(CLIP):
            norm = _norm(parameters)
            torch.nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        return norm

    @property
    def masks(self) -> bool:
        """True if `apply` may be a flag on the device: torch's fused optimizers read it as `found_inf`."""
        return bool(self.optimizer.defaults.get("fused"))

    def step(self, learning_rate: float, *, apply: bool | torch.Tensor = True) -> torch.Tensor:
        """Sum gradients over ranks, clip them, step; return their norm before clipping, a scalar.

        A gradient that is not finite changes nothing, and its norm is returned as it is; without `apply`
        none does, and the norm may be NaN.
        """
        norm = self._clipped(learning_rate)
        if isinstance(apply, torch.Tensor):
            optimizer: Any = self.optimizer
            optimizer.found_inf = (~(apply & torch.isfinite(norm))).float()
            optimizer.step()
            del optimizer.found_inf
        elif apply and math.isfinite(norm.item()):
            self.optimizer.step()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def discard(self) -> None:
        """Forget the gradients that were added since the last step."""
        self.optimizer.zero_grad(set_to_none=True)

    def weights(self) -> Weights:
        """Return the trained parameters, unsharded, on the main rank's CPU; every rank calls it, others get {}."""
        if not self.is_main:
            return {}
        return {n: _copy(p) for n, p in self.parameters.items()}

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Set the trained parameters; every rank calls it."""
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])

    def state(self) -> tuple[Weights, dict[str, Any]]:
        """Return optimizer tensors keyed `parameter|state`, and what fits JSON; as `weights` does."""
        if not self.is_main:
            return {}, {}
        tensors: Weights = {}
        scalars: dict[str, dict[str, Any]] = {}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    tensors[f"{name}|{key}"] = _copy(value)
                else:
                    scalars.setdefault(name, {})[key] = value
        return tensors, {"optimizer": self._kind, "scalars": scalars, "scaler": self.scaler.state_dict()}

    def load_state(self, tensors: Mapping[str, torch.Tensor], rest: Mapping[str, Any]) -> None:
        """Take back what `state` returned; every rank calls it.

        Raises:
            CheckpointError: it is another optimizer's.
        """
        if rest.get("optimizer", self._kind) != self._kind:
            raise CheckpointError(f"its optimizer is {rest['optimizer']}, and this run uses {self._kind}.")
        self._load_tensors(tensors)
        for name, values in rest["scalars"].items():
            self.optimizer.state[self.parameters[name]].update(values)
        if hasattr(self.optimizer, "initialized"):  # bitsandbytes fills its lookup tables at its first step
            self.optimizer.initialized = False
        if rest.get("scaler"):
            self.scaler.load_state_dict(dict(rest["scaler"]))

    @torch.no_grad()
    def _load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set the optimizer's tensors; those of a paged optimizer go into its paged buffers."""
        before = {p: dict(self.optimizer.state.get(p, {})) for p in self.parameters.values()}
        self.optimizer.state.clear()
        paged: list[tuple[torch.Tensor, torch.Tensor]] = []
        for key, tensor in tensors.items():
            name, _, part = key.rpartition("|")
            parameter = self.parameters[name]
            if getattr(self.optimizer, "is_paged", False) and tensor.shape == parameter.shape:
                buffer = before[parameter].get(part)  # after a rollback: bitsandbytes never frees one
                if buffer is None:
                    buffer = self.optimizer.get_state_buffer(parameter, dtype=tensor.dtype)  # type: ignore[attr-defined]
                paged.append((buffer, tensor))
                self.optimizer.state[parameter][part] = buffer
            else:
                self.optimizer.state[parameter][part] = tensor.to(parameter.device)
        if paged and torch.cuda.is_available():
            torch.cuda.synchronize()  # the GPU is done with them: the CPU writes into managed memory itself
        for buffer, tensor in paged:
            buffer.copy_(tensor)
