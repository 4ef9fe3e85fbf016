"""What of a model is trained: LoRA, QLoRA or all of it; group `mode`."""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sftx.errors import ModelError
from sftx.model.head import LossRequest, ModelWithLoss
from sftx.model.lora.dropout import Clock, KeyedDropout
from sftx.model.lora.routing import Routing, Span
from sftx.model.lora.targets import Layers, check_injected, injected, left_out_by, share_in_4_bits, size_of
from sftx.model.modes import Full, Lora
from sftx.seeds import key_of


@dataclass
class Adapter:
    """One trained set of parameters on a base, with the clock that its dropout reads."""

    name: str
    parameters: dict[str, nn.Parameter]
    clock: Clock
    is_lora: bool = True
    config: Any = field(default=None, repr=False)
    left_out: list[str] = field(default_factory=list)
    """Layers that are not adapted, each with its reason."""

    @property
    def without_dropout(self) -> list[str]:
        """The weights that PEFT adapts as parameters, by the ends of their names: it has no dropout for those."""
        return list(getattr(self.config, "target_parameters", None) or [])


class AdaptedModel:
    """A base model and the adapters trained on it; full mode is one adapter that is the model itself."""

    def __init__(
        self, base: Any, *, trained_dtype: torch.dtype, gradient_checkpointing: bool | str, sharded: bool = False
    ) -> None:
        self.network = ModelWithLoss(base)
        self.sharded = sharded
        """Parameters are gathered by hooks of the modules that own them, which therefore must be called."""
        self.call: Callable[..., Any] = self.network
        """What runs a forward pass."""
        self.computes_losses = False
        """Losses are computed from hidden states; where the logits are not just the head's output, from logits."""
        self.trained_dtype = trained_dtype
        self.adapters: dict[str, Adapter] = {}
        self.routing = Routing()
        self._layers: Layers | None = None
        self.recomputed_part = {False: 0.0, "selective": 0.5}.get(gradient_checkpointing, 1.0)
        """Of the blocks, those whose forward pass is made again in the backward pass."""
        if gradient_checkpointing:
            with _quiet():
                base.activation_checkpointing_enable(
                    {"use_reentrant": False},
                    every_n_layers=2 if gradient_checkpointing == "selective" else 1,
                    offload=gradient_checkpointing == "offload",
                )

    @property
    def module(self) -> Any:
        """The model with its adapters, as transformers or PEFT has it."""
        return self.network.model

    @property
    def base(self) -> Any:
        """The model as transformers has it."""
        return self.module.get_base_model() if hasattr(self.module, "get_base_model") else self.module

    def __call__(self, **inputs: Any) -> Any:
        """Run the forward pass and return the model's output, with its logits."""
        return self.call(**inputs)

    def losses(self, request: LossRequest, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weighted sum of the requested tokens' cross entropies, and each of them, fp32 `[N]`."""
        if self.computes_losses:
            total, losses_N = self.call(request=request, **inputs)
            return total, losses_N
        logits_NV = request.select(self.call(logits_to_keep=request.positions_P, **inputs).logits)
        losses_N = F.cross_entropy(logits_NV.float(), request.targets_N, reduction="none")
        return (losses_N * request.weights_N).sum(), losses_N

    def call_through(self, forward: Callable[..., Any]) -> None:
        """Call this instead of the network from now on: an engine has wrapped it."""
        self.call = forward

    @property
    def device(self) -> torch.device:
        """The device that inputs go to."""
        return self.module.get_input_embeddings().weight.device

    def add(self, name: str, mode: Lora | Full, seed: int, *, start: Path | None = None) -> Adapter:
        """Add a trained set of parameters, initialised from its own generator or from a saved adapter.

        Raises:
            ModelError: `start` holds no adapter that fits this base.
        """
        clock = Clock(seed)
        if isinstance(mode, Full):
            for parameter in self.module.parameters():
                parameter.requires_grad_(True)
            adapter = Adapter(name, dict(self.module.named_parameters()), clock, is_lora=False)
        else:
            if self._layers is None:  # read before the first adapter changes the names of the layers
                self._layers = Layers(self.module)
            targets = self._layers.choose(mode.target_modules)
            config = mode.peft_config(targets) if start is None else _saved_config(start, mode)
            self._inject(name, config)
            left_out = targets.left_out
            if start is None:
                check_injected(self.module, name, targets)
            else:
                found = injected(self.module, name)
                if mode.target_modules != "all-linear" and found != targets.names:
                    raise ModelError(
                        f"adapter={start}: it adapts other layers ({', '.join(_ends(found))}) than lora_target_modules "
                        f"names ({', '.join(_ends(targets.names))}). Leave lora_target_modules out to go on with it."
                    )
                left_out = left_out_by(start, found, targets)
            parameters = {n: p for n, p in self.module.named_parameters() if adapter_of(n) == name}
            adapter = Adapter(name, parameters, clock, config=config, left_out=left_out)
            self._initialise(adapter, seed, mode.dropout)
            saved = read_adapter(start, adapter) if start is not None else {}
            for key, parameter in parameters.items():
                parameter.data = saved.get(key, parameter.data).to(parameter.device, self.trained_dtype)
                parameter.requires_grad_(True)
        self.adapters[name] = adapter
        return adapter

    def _inject(self, name: str, config: Any) -> None:
        """Let PEFT put in its layers.

        Raises:
            ModelError: it does not.
        """
        from peft import PeftModel, get_peft_model

        if not (self.sharded or config.target_parameters):  # PEFT would put ours on those parameters' layers too
            from sftx.model.lora.layer import custom_modules

            config._register_custom_module(custom_modules(self.module))
        try:
            with _quiet(), torch.random.fork_rng(devices=[]):  # PEFT draws initial values that are replaced below
                if isinstance(self.module, PeftModel):
                    self.module.add_adapter(name, config)
                else:
                    self.network.model = get_peft_model(self.module, config, adapter_name=name)
        except (ValueError, TypeError, NotImplementedError) as error:
            kind = self.module.config.model_type
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ModelError(f"PEFT cannot put LoRA layers into this model ({kind}): {reason}") from error

    def _initialise(self, adapter: Adapter, seed: int, dropout: float) -> None:
        """Draw A as PEFT does, from a generator of this adapter and layer; put in what is sftx's own."""
        for number, layer in enumerate(lora_layers(self.module)):
            if adapter.name not in layer.lora_A:
                continue
            weight = layer.lora_A[adapter.name].weight
            generator = torch.Generator().manual_seed(key_of(seed, number))
            drawn = torch.empty(weight.shape)
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
            weight.data.copy_(drawn)
            nn.init.zeros_(layer.lora_B[adapter.name].weight)
            if not hasattr(layer, "parameter_name"):  # PEFT's layer of a parameter has no dropout
                layer.lora_dropout[adapter.name] = KeyedDropout(dropout, adapter.clock, number)
            layer.routing = self.routing

    @contextmanager
    def using(self, name: str) -> Iterator[Adapter]:
        """Let one adapter be the active one inside the block."""
        adapter = self.adapters[name]
        if adapter.is_lora and len(self.adapters) > 1:
            for layer in lora_layers(self.module):
                layer.set_adapter([name])
            self._unfreeze()
        yield adapter

    @contextmanager
    def routed(self, spans: Sequence[Span]) -> Iterator[None]:
        """Let each span of the flattened batch's tokens use its own adapter inside the block.

        Raises:
            ModelError: a layer cannot: PEFT's layers of parameters, bases split over ranks or quantized otherwise.
        """
        from sftx.model.lora.layer import RoutedLora

        if unable := [layer for layer in lora_layers(self.module) if not isinstance(layer, RoutedLora)]:
            raise ModelError(f"a LoRA layer of class {type(unable[0]).__name__} cannot use several adapters at once.")
        with self.routing.over(spans):
            yield

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """Let the forward passes inside the block be those of the frozen base.

        Raises:
            ModelError: `mode=full` has trained the base itself.
        """
        if not all(adapter.is_lora for adapter in self.adapters.values()):
            raise ModelError("mode=full trains the base itself: there is no model without adapters.")
        with self.module.disable_adapter() if self.adapters else nullcontext():
            yield
        self._unfreeze()  # disabling them freezes them

    def _unfreeze(self) -> None:
        """Let gradients reach the parameters of all adapters: PEFT freezes those that are not active."""
        for adapter in self.adapters.values():
            for parameter in adapter.parameters.values():
                parameter.requires_grad_(True)

    def facts(self, adapter: Adapter) -> dict[str, Any]:
        """Return what the base and one adapter consist of; a 4-bit weight counts as its values."""
        adapted = Counter(n.removesuffix(".weight").rpartition(".")[2] for n in injected(self.module, adapter.name))
        base = [p for n, p in self.module.named_parameters() if adapter_of(n) is None]
        return {
            "parameters": sum(map(size_of, base)),
            "trained_parameters": sum(map(size_of, adapter.parameters.values())),
            "share_in_4_bits": share_in_4_bits(self.module),
            "adapted_layers": dict(sorted(adapted.items())),
            "not_adapted": adapter.left_out,
        }


def adapter_of(name: str) -> str | None:
    """Return the adapter that a parameter of this name belongs to (`...lora_A.default.weight`); None for the base's."""
    *_, kind, adapter, _ = ("", "", *name.split("."))
    return adapter if kind in ("lora_A", "lora_B") else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' notes on its own renaming (gradient to activation checkpointing) from the user."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
        yield


def _ends(names: set[str]) -> list[str]:
    return sorted({n.removesuffix(".weight").rpartition(".")[2] for n in names})


def lora_layers(module: nn.Module) -> list[Any]:
    """Return a model's LoRA layers in the order of its modules."""
    from peft.tuners.lora import LoraLayer

    return [m for m in module.modules() if isinstance(m, LoraLayer)]


def _saved_config(folder: Path, mode: Lora) -> Any:
    from peft import LoraConfig

    if not (folder / "adapter_config.json").is_file():
        raise ModelError(f"adapter={folder}: holds no adapter_config.json, so it is not a LoRA adapter's folder.")
    config = LoraConfig.from_pretrained(folder)
    if (config.r, config.lora_alpha) != (mode.rank, mode.alpha):  # another alpha would rescale what it has learned
        raise ModelError(
            f"adapter={folder}: it has rank {config.r} and alpha {config.lora_alpha:g}, but lora_rank={mode.rank} "
            f"lora_alpha={mode.alpha:g}. Type lora_rank={config.r} lora_alpha={config.lora_alpha:g} to go on with it."
        )
    if config.use_rslora != mode.use_rslora:
        raise ModelError(f"adapter={folder}: it was trained with mode.use_rslora={str(config.use_rslora).lower()}.")
    config.lora_dropout = 0.0 if config.target_parameters else mode.dropout
    config.inference_mode = False
    return config


def read_adapter(folder: Path, adapter: Adapter) -> dict[str, torch.Tensor]:
    """Return a saved adapter's weights under their names in the model.

    Raises:
        ModelError: a tensor is missing, unknown, or of another shape.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        saved = load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder}: its adapter cannot be read: {error}") from error
    found = {re.sub(r"\.(lora_[AB])\.weight$", rf".\1.{adapter.name}.weight", k): t for k, t in saved.items()}
    check_fit(found, adapter, f"{folder}: its adapter does not fit this model")
    return found


def check_fit(found: Mapping[str, torch.Tensor], adapter: Adapter, what: str) -> None:
    """Compare names and shapes of tensors with those of the trained parameters; `what` begins the message.

    Raises:
        ModelError: a tensor is missing, unknown, or of another shape.
    """
    shapes = {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in adapter.parameters.items()}
    unfit = [n for n in shapes.keys() | found.keys() if n not in found or tuple(found[n].shape) != shapes.get(n)]
    if unfit:
        first = min(unfit)
        there = f"shape {list(found[first].shape)}" if first in found else "nothing"
        wanted = f"shape {list(shapes[first])}" if first in shapes else "nothing"
        raise ModelError(f"{what}: {len(unfit)} tensors differ, first {first}: expected {wanted}, got {there}.")
