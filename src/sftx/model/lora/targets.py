"""Which layers an adapter is put on: found by what they are, and compared with what PEFT made of them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from sftx.errors import ModelError, did_you_mean

ROUTER = re.compile(r"(^|_)(gate|router|gating)$|(Router|Gate|Gating)$")
"""Names of modules, and of their classes, that weigh a mixture's experts."""
EXPERTS = re.compile(r"^experts$|Experts$")
"""Names of modules, and of their classes, that hold a mixture's experts."""
ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
"""Names of modules, and of their classes, that are attention."""
CPU_OUTPUTS = 32
"""The outputs of a layer in 4 bits are a multiple of this, for bitsandbytes' kernels on a CPU."""


@dataclass
class Targets:
    """The layers that are adapted, and what is left out and why."""

    names: set[str]
    """Modules by their names in the base; where PEFT adapts a weight as a parameter, that parameter."""
    modules: list[str]
    """Linear layers, as PEFT finds them by the ends of their names."""
    parameters: list[str] = field(default_factory=list)
    """Weights of linear layers whose names PEFT takes for a mixture's experts; adapted without dropout."""
    left_out: list[str] = field(default_factory=list)
    """What is not adapted, each with its reason."""


def size_of(parameter: Any) -> int:
    """Return the number of values of a parameter, also of one in 4 bits or split over ranks by DeepSpeed."""
    state = getattr(parameter, "quant_state", None)
    return math.prod(state.shape) if state is not None else getattr(parameter, "ds_numel", parameter.numel())


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return a model's repeated blocks: the list that holds most of its parameters."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return list(max(lists, key=lambda m: sum(map(size_of, m.parameters())), default=[]))


class Layers:
    """The linear layers of a model's decoder, as they are before the first adapter changes their names.

    Raises:
        ModelError: no repeated block with linear layers.
    """

    def __init__(self, model: Any) -> None:
        self.kind = str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
        inside = {id(m) for block in decoder_layers(model) for m in block.modules()}
        every = dict(model.named_modules())
        routers, past = routers_of(model), _read_by_kernels(model)
        linear = {n: m for n, m in every.items() if isinstance(m, nn.Linear)}
        self.names = [n for n, m in linear.items() if id(m) in inside and n not in routers and n not in past]
        if not self.names:
            raise ModelError(
                f"no linear layers were found in the blocks of {type(model).__name__}: LoRA has nothing to adapt."
            )
        self.refused = {n: "is outside the decoder's blocks" for n in linear if n not in self.names}
        self.refused |= dict.fromkeys(routers, "weighs a mixture's experts")
        self.refused |= dict.fromkeys(past, "is read by a Mamba layer's kernels, which do not call it")
        self.attention = [n for n in self.names if any(_is_attention(p, every[p]) for p in _parents(n))]
        self.left_out = []
        """What `all-linear` leaves out, each with its reason."""
        if fused := fused_experts(model):
            share = sum(map(size_of, fused.values())) / sum(map(size_of, model.parameters()))
            self.left_out.append(f"the experts ({share:.0%} of the parameters; LoRA layers are for linear layers)")
        if left := [n for n in linear if id(linear[n]) in inside and n in past]:
            self.left_out.append(
                f"{', '.join(_leaves(left))} of Mamba layers (their kernels read the weight, not the layer)"
            )
        self.modules, self.parameters = list(every), [n for n, _ in model.named_parameters()]
        self.taken = {leaf for leaf in _leaves(self.names) if _taken_for_experts(model, leaf)}

    def choose(self, wanted: str | list[str]) -> Targets:
        """Return the layers that `lora_target_modules` names: `all-linear`, `attention`, names, or a pattern.

        A name is that of a layer or the end of it, at a dot; a pattern is a regular expression for whole names. Short
        names (`q_proj`) are returned when they mean exactly those layers.

        Raises:
            ModelError: a name or pattern that fits no layer, or one that cannot be adapted.
        """
        if wanted == "all-linear":
            names = self.names
        elif wanted == "attention" and self.attention:
            names = self.attention
        else:
            chosen = {n for word in ([wanted] if isinstance(wanted, str) else wanted) for n in self._called(word)}
            names = [n for n in self.names if n in chosen]
        modules = [n for n in names if _end(n) not in self.taken]
        parameters = [f"{n}.weight" for n in names if _end(n) in self.taken]
        return Targets(
            {*modules, *parameters},
            _short(modules, self.modules, parts=1),
            _short(parameters, self.parameters, parts=2),
            self.left_out if wanted == "all-linear" else [],
        )

    def _called(self, word: str) -> list[str]:
        """Return the layers that a name or a pattern means."""
        found = [n for n in self.names if _fits(word, n)]
        refused = [n for n in self.refused if _fits(word, n)]
        if found and not (refused and word in _leaves(refused)):
            return found
        there = f"Its layers: {', '.join(_leaves(self.names))}."
        if refused:
            what = f"`{refused[0]}` {self.refused[refused[0]]}, and no adapter is put on it."
        else:
            hint = did_you_mean(word, ["all-linear", "attention", *_leaves(self.names)])
            what = f"no linear layer of this model ({self.kind}) is called that, or fits it as a pattern.{hint}"
        raise ModelError(f"lora_target_modules: `{word}`: {what} {there}")


def check_injected(model: nn.Module, adapter: str, targets: Targets) -> None:
    """Compare the layers that PEFT has adapted with those that were asked for.

    Raises:
        ModelError: they differ.
    """
    if unlike := injected(model, adapter) ^ targets.names:
        first = min(unlike)
        what = "is not adapted" if first in targets.names else "is adapted, which was not asked for"
        raise ModelError(
            f"PEFT adapts other layers than it was asked to: {len(unlike)} differ, first `{first}` {what}."
        )


def left_out_by(start: Path, found: set[str], targets: Targets) -> list[str]:
    """Return what is not adapted when a saved adapter's own layers are: `found`."""
    lacking = _leaves(n.removesuffix(".weight") for n in targets.names - found)
    left_out = [] if found - targets.names else list(targets.left_out)  # it may hold what is usually left out
    return [*left_out, *([f"{', '.join(lacking)} (of all or some blocks; not in {start})"] if lacking else [])]


def injected(model: nn.Module, adapter: str) -> set[str]:
    """Return the modules and parameters that PEFT has adapted, by their names in the base."""
    from peft.tuners.lora import LoraLayer

    found = set()
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter in module.lora_A:
            base = name.removeprefix("base_model.model.").replace(".base_layer", "")
            found.add(".".join(filter(None, (base, getattr(module, "parameter_name", "")))))
    return found


def routers_of(model: nn.Module) -> set[str]:
    """Return the linear layers that weigh a mixture's experts: named as a gate, in a module that holds experts."""
    found = set()
    for name, block in model.named_modules():
        children = dict(block.named_children())
        if not any(_named(EXPERTS, *child) for child in children.items()):
            continue
        for child, module in children.items():
            if _named(ROUTER, child, module):
                paths = (f"{name}.{child}.{n}" for n, m in module.named_modules() if isinstance(m, nn.Linear))
                found |= {path.rstrip(".") for path in paths}
    return found


def fused_experts(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that hold the weights of many experts at once."""
    found: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        if _named(EXPERTS, _end(name), module):
            for inner, part in module.named_modules(prefix=name):
                if not isinstance(part, nn.Linear):
                    weights = part.named_parameters(prefix=inner, recurse=False)
                    found |= {n: p for n, p in weights if len(getattr(p, "ds_shape", p.shape)) > 1}
    return found


def kept_whole(model: Any) -> list[str] | None:
    """Return the layers that are not quantized, or None where the library's own choice (the head) will do.

    A mixture's routers; layers too narrow for the 4-bit kernels of CPUs (one output); and those that PEFT adapts
    as parameters, which it cannot read in 4 bits.
    """
    head = model.get_output_embeddings()
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    taken = {leaf for leaf in _leaves(linear) if _taken_for_experts(model, leaf)}
    routers = routers_of(model)
    whole = [n for n, m in linear.items() if n in routers or m.out_features % CPU_OUTPUTS or _end(n) in taken]
    return [*(n for n, m in model.named_modules() if m is head), *whole] if whole else None


def share_in_4_bits(model: nn.Module) -> float:
    """Return the share of a base's parameters that are held in 4 bits."""
    base = [(p, size_of(p)) for n, p in model.named_parameters() if ".lora_" not in n]
    return sum(size for p, size in base if getattr(p, "quant_state", None) is not None) / sum(s for _, s in base)


def _read_by_kernels(model: nn.Module) -> set[str]:
    """Return the output projections of Mamba layers: their kernels take the weight, so a LoRA layer is not called."""
    mixers = (n for n, m in model.named_modules() if all(hasattr(m, a) for a in ("A_log", "D", "conv1d", "out_proj")))
    return {f"{name}.out_proj" for name in mixers}


def _taken_for_experts(model: Any, leaf: str) -> bool:
    """Return True where PEFT reads a layer's name as transformers 4's name of experts that transformers 5 fuses."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=[leaf])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # one of two names that it would fuse
        return True
    return bool(config.target_parameters)


def _named(pattern: re.Pattern[str], name: str, module: nn.Module) -> bool:
    return bool(pattern.search(name) or pattern.search(type(module).__name__))


def _is_attention(name: str, module: nn.Module) -> bool:
    return _named(ATTENTION, _end(name), module)


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def _fits(word: str, name: str) -> bool:
    """Return True if a layer has this name, ends with it, or fits it as a regular expression."""
    return f".{name}".endswith(f".{word}") or re.fullmatch(word, name) is not None


def _end(name: str) -> str:
    return name.rpartition(".")[2]


def _leaves(names: Iterable[str]) -> list[str]:
    return sorted({_end(n) for n in names})


def _short(names: list[str], known: Iterable[str], *, parts: int) -> list[str]:
    """Return the last parts of names where those mean exactly these."""
    short = sorted({".".join(n.split(".")[-parts:]) for n in names})
    meant = [n for n in known if ".".join(n.split(".")[-parts:]) in short]
    return short if sorted(meant) == sorted(names) else names
