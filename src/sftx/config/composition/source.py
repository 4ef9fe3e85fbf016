"""Where Hydra reads sftx's YAML from: `conf/`, `sweeps/` and the user's folders.

Hydra's own file source would do, but for three things: overlays apply globally even without a header,
an error must name the file and the line, and one error must not hide the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from sftx.config.composition.aliases import refuse_in_yaml
from sftx.config.composition.overlays import Reading, overlay_body
from sftx.config.composition.yaml_file import read_yaml
from sftx.config.options import ALL_GROUPS, CONF, folder_of, user_folders
from sftx.config.schema import GROUPS, LIST_GROUPS, OVERLAYS
from sftx.config.untrusted.file_keys import file_problems, package_problem
from sftx.errors import raise_problems

LAYERS = {"train": 0, **{group: 2 + i for i, group in enumerate(OVERLAYS)}}
"""Primary config, then (1) the groups, then the overlays: the order of the defaults list in conf/train.yaml."""

_reading: Reading | None = None


@contextmanager
def collecting(typed: frozenset[str]) -> Iterator[Reading]:
    """Collect the problems of the files read inside the block; outside of it the first file's are raised."""
    global _reading
    _reading = Reading(typed)
    try:
        yield _reading
    finally:
        _reading = None


class SftxConfigSource(ConfigSource):
    """A folder of YAML files that are checked as they are read."""

    @staticmethod
    def scheme() -> str:
        return "sftx"

    def _file(self, config_path: str) -> Path:
        group, _, rest = config_path.partition("/")
        return folder_of(Path(self.path), group) / rest if rest or group in ALL_GROUPS else Path(self.path, group)

    def available(self) -> bool:
        return Path(self.path).is_dir()

    def is_group(self, config_path: str) -> bool:
        return self._file(config_path).is_dir()

    def is_config(self, config_path: str) -> bool:
        return self._file(self._normalize_file_name(config_path)).is_file()

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        names = {p.name for p in self._file(config_path).iterdir()} if config_path else set(ALL_GROUPS)
        found: list[str] = []
        for name in sorted(names):
            self._list_add_result(found, f"{config_path}/{name}" if config_path else name, name, results_filter)
        return found

    def load_config(self, config_path: str) -> ConfigResult:
        file = read_yaml(self._file(self._normalize_file_name(config_path)))
        reading = _reading or Reading()
        reading.problems += file.problems
        header = self._get_header_dict(file.text)
        group, _, rest = config_path.partition("/")
        misplaced = package_problem(header["package"], group) if group in GROUPS else None
        if misplaced:
            reading.problems.append(f"{file.place('')}: {misplaced}")
            header["package"] = None
        package = "_global_"
        if group == "hydra":  # a launcher's or a sweeper's option file
            package = header["package"] = config_path.rpartition("/")[0].replace("/", ".")
        elif group in GROUPS:
            package = header["package"] or (f"{group}.{rest}" if group in LIST_GROUPS else group)
        reading.problems += file_problems(file.body, file.place, "" if package == "_global_" else package)
        if package == "_global_":
            reading.problems += refuse_in_yaml(file.body, group, file.place)
        body = overlay_body(file, group, reading) if group in OVERLAYS else file.body
        header["package"] = package
        reading.loaded.append((LAYERS.get(group, 1), file, "" if package == "_global_" else package))
        if _reading is None:
            raise_problems(reading.problems)
        return ConfigResult(self.provider, self.full_path(), OmegaConf.create(body), header)


class SftxSearchPath(SearchPathPlugin):
    """Puts the user's `--config-dir` folders and `conf/` on Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in user_folders:
            search_path.append("command-line", f"sftx://{folder}")
        search_path.append("sftx", f"sftx://{CONF}")
