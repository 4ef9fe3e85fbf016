"""What sftx must know of a model family; group `model`."""

from __future__ import annotations

from dataclasses import dataclass

from sftx.build import build
from sftx.config.options import component_of, family_of_type, options
from sftx.config.schema import Node


@dataclass(frozen=True)
class Family:
    """A family's facts: the model types it covers, its chat template, and the tokens that end a turn."""

    model_types: list[str]
    template: str | None
    stop_tokens: list[str]


def family_named(name: str) -> Family | None:
    """Return the family called `name`, or that covers the model_type `name`; None when sftx knows neither."""
    option = name if name in options("model") else family_of_type(name)
    if option is None:
        return None
    return build(component_of("model", option))


def family_of(composed: Node, model_type: str, *, downloaded: bool) -> tuple[Family, list[str]]:
    """Return the composed family, or the model's own where a download told its type only now, and remarks."""
    family: Family = build(composed)
    own = family_named(model_type)
    if not downloaded or own is None or model_type in family.model_types:
        return family, []
    return own, [f"the model's own type is {model_type}: its family's facts are used, not those composed"]
