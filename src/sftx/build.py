"""Build a component from its node, as Hydra instantiates it."""

from __future__ import annotations

from typing import Any

from hydra.utils import instantiate

from sftx.config.schema import Node
from sftx.errors import ConfigError, SftxError


def build(node: Node, **arguments: Any) -> Any:
    """Let Hydra build a component from its node.

    Raises:
        ConfigError: its class cannot be imported or refuses the values.
    """
    try:
        return instantiate(node, _convert_="all", **arguments)
    except SftxError:
        raise
    except Exception as error:
        cause = error.__cause__ or error
        raise ConfigError(f"`{node.get('_target_')}` cannot be built: {cause}") from error
