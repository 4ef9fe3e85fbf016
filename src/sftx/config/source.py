"""Where Hydra reads sftx's YAML from: `conf/` and `sweeps/`, in one spelling, with line numbers.

Hydra's own file source would do, but for three things: the manual's spellings must work inside an
experiment or a sweep file, overlays apply globally whether or not their header says so, and an
error must name the file and the line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sftx import PROJECT_ROOT
from sftx.config.schema import GROUPS, OVERLAYS
from sftx.config.spellings import MIRRORS, Choices, Sweep, raise_if, rewrite, show
from sftx.errors import ConfigError

GROUP_NAMES = frozenset(GROUPS)
FOLDER_OF_GROUP = {"sweep": "../sweeps"}
user_folders: list[Path] = []
"""Folders given by `--config-dir`, searched before `conf/`."""


@dataclass(frozen=True)
class LoadedFile:
    """A YAML file that took part in the composition, and where its keys went."""

    path: Path
    package: str

    def line_of(self, key: str) -> int | None:
        """Return the line that sets a dotted key of the composed config, or None."""
        if self.package:
            if not key.startswith(self.package + "."):
                return None
            key = key.removeprefix(self.package + ".")
        node = yaml.compose(self.path.read_text(encoding="utf-8"))
        line = None
        for part in key.split("."):
            if not isinstance(node, yaml.MappingNode):
                return None
            pairs = {k.value: (k, v) for k, v in node.value}
            if part not in pairs:
                return None
            line, node = pairs[part][0].start_mark.line + 1, pairs[part][1]
        return line


loaded: list[LoadedFile] = []
notes: list[str] = []


class SftxConfigSource(ConfigSource):
    """A folder of YAML files whose keys are rewritten to one spelling as they are read."""

    @staticmethod
    def scheme() -> str:
        return "sftx"

    def _file(self, config_path: str) -> Path:
        group, _, rest = config_path.partition("/")
        folder = FOLDER_OF_GROUP.get(group)
        return Path(self.path, folder, rest) if folder else Path(self.path, config_path)

    def available(self) -> bool:
        return Path(self.path).is_dir()

    def is_group(self, config_path: str) -> bool:
        return self._file(config_path).is_dir()

    def is_config(self, config_path: str) -> bool:
        return self._file(self._normalize_file_name(config_path)).is_file()

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        found: list[str] = []
        names = [p.name for p in self._file(config_path).iterdir()]
        if not config_path:
            names += list(FOLDER_OF_GROUP)
        for name in names:
            self._list_add_result(found, f"{config_path}/{name}" if config_path else name, name, results_filter)
        return sorted(set(found))

    def load_config(self, config_path: str) -> ConfigResult:
        path = self._file(self._normalize_file_name(config_path))
        text = path.read_text(encoding="utf-8")
        try:
            raw = OmegaConf.to_container(OmegaConf.create(text or "{}"), resolve=False)
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(_yaml_problem(path, error)) from None
        if not isinstance(raw, dict):
            raise ConfigError(f"{shown(path)}: holds no `key: value` lines.")
        header = self._get_header_dict(text)
        body: dict[str, Any] = {str(k): v for k, v in raw.items()}
        group, _, option = config_path.rpartition("/")
        package = header["package"] or group.replace("/", ".")
        if group in GROUPS:
            body = _mirrored(body, group, option, header)
        elif group in OVERLAYS or not group:
            body = _rewritten(body, path, primary=not group)
            package = header["package"] = "_global_"
        loaded.append(LoadedFile(path, "" if package == "_global_" else package))
        return ConfigResult(provider=self.provider, path=self.full_path(), config=OmegaConf.create(body), header=header)


class SftxSearchPath(SearchPathPlugin):
    """Puts the user's `--config-dir` folders and `conf/` on Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in user_folders:
            search_path.append("command-line", f"sftx://{folder}")
        search_path.append("sftx", f"sftx://{PROJECT_ROOT / 'conf'}")


def _mirrored(body: dict[str, Any], group: str, option: str, header: dict[str, str | None]) -> dict[str, Any]:
    """Let the manual's key mirror the choice: loading `mode/qlora` sets `train_mode: qlora`."""
    if group not in MIRRORS:
        return body
    if header["package"] is None:
        defaults = {"defaults": body.pop("defaults")} if "defaults" in body else {}
        body = defaults | {group: body}
        header["package"] = "_global_"
    return body | {MIRRORS[group]: option}


def _rewritten(body: dict[str, Any], path: Path, *, primary: bool) -> dict[str, Any]:
    where = shown(path)
    choices = rewrite({k: v for k, v in body.items() if k not in ("defaults", "hydra")}, where, GROUP_NAMES)
    if primary:  # its own keys of these names are interpolations that show the choice
        choices = Choices(values={k: v for k, v in body.items() if k not in ("defaults", "hydra")})
    notes.extend(choices.notes)
    defaults = _with_choices(body.get("defaults", []), choices, where)
    raise_if(choices.problems)
    hydra = body.get("hydra")
    if isinstance(hydra, dict) and isinstance(hydra.get("sweeper"), dict):
        params = hydra["sweeper"].get("params")
        if isinstance(params, dict):
            hydra["sweeper"]["params"] = _rewritten_space(params, where)
    out: dict[str, Any] = {"defaults": defaults} if defaults else {}
    return out | choices.values | ({"hydra": hydra} if hydra is not None else {})


def _with_choices(defaults: list[Any], choices: Choices, where: str) -> list[Any]:
    """Add the groups chosen in a file's body to its defaults list, as overrides."""
    listed = {}
    for entry in defaults:
        if isinstance(entry, dict):
            for key, option in entry.items():
                listed[key.removeprefix("override ").lstrip("/")] = option
    added = []
    for group, option in choices.groups.items():
        if group in listed and listed[group] != option:
            choices.problems.append(
                f"{where}: the defaults list chooses {group}={show(listed[group])}, "
                f"the keys below choose {group}={show(option)}: keep one."
            )
        elif group not in listed:
            added.append({f"override /{group}": option})
    return [*defaults, *added]


def _rewritten_space(params: dict[str, Any], where: str) -> dict[str, Any]:
    """Rewrite the keys and values of a sweep file's search space."""
    typed = {k: Sweep(tuple(_scalar(s) for s in str(v).split(","))) if _is_list(v) else v for k, v in params.items()}
    choices = rewrite(typed, where, GROUP_NAMES | frozenset(OVERLAYS))
    raise_if(choices.problems)
    notes.extend(choices.notes)
    return {k: show(v) if isinstance(v, Sweep) else v for k, v in (choices.values | choices.groups).items()}


def _is_list(value: Any) -> bool:
    return isinstance(value, str) and "," in value and not re.search(r"[\[({'\"]", value)


def _scalar(text: str) -> Any:
    return {"true": True, "false": False}.get(text.strip().lower(), text.strip())


def shown(path: Path) -> str:
    """Return a path as a message names it: relative to the checkout when inside it."""
    path = path.resolve()
    return str(path.relative_to(PROJECT_ROOT)) if path.is_relative_to(PROJECT_ROOT) else str(path)


def _yaml_problem(path: Path, error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    line = f":{mark.line + 1}" if mark else ""
    what = getattr(error, "problem", None) or str(error).split("\n")[0]
    return f"{shown(path)}{line}: not valid YAML: {what}."
