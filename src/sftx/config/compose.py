"""From `sys.argv` to a checked command line: everything wrong is said before anything heavy is imported."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sftx import PROJECT_ROOT
from sftx.config import source
from sftx.config.check import check_tree
from sftx.config.overrides import ALL_GROUPS, CommandLine, grammar, read_command_line
from sftx.config.schema import KNOBS, OVERLAYS
from sftx.config.spellings import OTHER_NAMES, option_for, raise_if, show
from sftx.errors import ConfigError, did_you_mean

CONFIG_NAME = "train"


@dataclass
class Request:
    """A command line that will compose: what Hydra gets, and what is to be said about it."""

    argv: list[str]
    notes: list[str]
    multirun: bool
    overrides: list[str] = field(default_factory=list)
    typed: list[str] = field(default_factory=list)
    """The words after `train.py` as the user typed them."""

    def command(self) -> str:
        """Return the command, ready to be typed again."""
        return shlex.join(["python", "train.py", *self.typed])


def register_sources() -> None:
    """Teach Hydra to read `conf/` and `sweeps/` through `SftxConfigSource`."""
    plugins = Plugins.instance()
    plugins.register(source.SftxConfigSource)
    plugins.register(source.SftxSearchPath)


def prepare(argv: list[str]) -> Request:
    """Check a command line as a whole and return what Hydra shall run.

    Errors:
        ConfigError: every problem found, wherever it stands (command line, JSON, experiment, sweep).
    """
    register_sources()
    line = read_command_line(argv)
    _take_config_dirs(line)
    _follow_model_family(line)
    problems = _check_options(line)
    raise_if(problems)
    space = _space(line)
    found = _check_points(line, space)
    raise_if(found)
    notes = list(dict.fromkeys(line.notes + source.notes))
    overrides = list(line.overrides.values())
    return Request(line.flags + overrides, notes, line.multirun or bool(space), overrides, list(argv))


def compose_checked(overrides: list[str]) -> DictConfig:
    """Compose one configuration as the command line would, for tests and notebooks."""
    request = prepare(overrides)
    return _compose(request.overrides)


def _take_config_dirs(line: CommandLine) -> None:
    """Read `--config-dir FOLDER` through our source, so that its files may use the manual's spellings."""
    source.user_folders.clear()
    kept: list[str] = []
    words = iter(line.flags)
    for word in words:
        name, eq, value = word.partition("=")
        if name in ("--config-dir", "-cd"):
            folder = Path(value if eq else next(words, ""))
            if not folder.is_dir():
                raise ConfigError(f"command line: `--config-dir {folder}`: no such folder.")
            source.user_folders.append(folder.resolve())
        else:
            kept.append(word)
    line.flags = kept


def _folders() -> list[Path]:
    return [*source.user_folders, PROJECT_ROOT / "conf"]


def options(group: str) -> list[str]:
    """Return the options of a config group, sorted."""
    name = source.FOLDER_OF_GROUP.get(group, group)
    return sorted({p.stem for folder in _folders() for p in (folder / name).glob("*.yaml")})


def _check_options(line: CommandLine) -> list[str]:
    problems = []
    for key, text in line.overrides.items():
        plain = key.lstrip("+~").split("@")[0]
        origin = line.origins.get(plain, "command line")
        if plain in ALL_GROUPS and not key.startswith("~"):
            problems += _unknown_options(plain, _values_of(text), origin)
        elif "/" in plain and not plain.startswith("hydra/"):
            problems.append(f"{origin}: there is no config group `{plain}`.{did_you_mean(plain, ALL_GROUPS)}")
    return problems


def _values_of(text: str) -> tuple[Any, ...]:
    override = OverridesParser.create().parse_override(text)
    value = override._value
    chosen = [str(v) for v in override.sweep_string_iterator()] if override.is_sweep_override() else [value]
    out: list[Any] = []
    for choice in chosen:
        if isinstance(choice, str) and choice.startswith("["):
            choice = [c for c in choice.strip("[]").split(",") if c]
        out += choice if isinstance(choice, list) else [choice]
    return tuple(out)


def _unknown_options(group: str, chosen: tuple[Any, ...], origin: str) -> list[str]:
    known = options(group)
    problems = []
    for option in chosen:
        if option is None and group in OVERLAYS:
            continue
        name = option.text if hasattr(option, "text") else option
        if str(name) not in known:
            names = [*known, *OTHER_NAMES.get(group, {})]
            problems.append(
                f"{origin}: `{group}` has no option {show(name)!r}.{did_you_mean(str(name), names)}\n"
                f"Allowed: {', '.join(known) or '(none yet)'}."
            )
    return problems


def _follow_model_family(line: CommandLine) -> None:
    """Choose `model=` by the folder's own model_type, unless a person typed it."""
    text = line.overrides.get("model_name_or_path")
    if text is None or "model" in line.typed:
        return
    families = {_family_of(str(v)) for v in _values_of(text)} - {None}
    if len(families) > 1:
        raise ConfigError(
            f"{line.origins.get('model_name_or_path')}: these models are of different families "
            f"({', '.join(sorted(map(str, families)))}): run one sweep for each."
        )
    for family in families:
        line.overrides["model"] = f"model={family}"
        line.origins["model"] = line.origins.get("model_name_or_path", "")


def _family_of(name: str) -> str | None:
    """Return the family option whose `model_types` hold a local model's own type; None when not local."""
    from sftx.model.find import local_folder  # light: looks at folders only

    folder = local_folder(name)
    if folder is None or not (folder / "config.json").is_file():
        return None
    try:
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (ValueError, KeyError, OSError):
        return None  # said with its reason when the model is loaded
    return family_of_type(model_type) or "generic"


def family_of_type(model_type: str) -> str | None:
    """Return the option of group `model` that knows a `model_type`, or None."""
    for folder in _folders():
        for path in sorted((folder / "model").glob("*.yaml")):
            types = re.search(r"^\s*model_types: *\[(.*)\]", path.read_text(encoding="utf-8"), re.MULTILINE)
            if types and model_type in [t.strip(" \"'") for t in types.group(1).split(",")]:
                return path.stem
    return None


def _compose(overrides: list[str], *, with_hydra: bool = False) -> DictConfig:
    source.loaded.clear()
    GlobalHydra.instance().clear()
    try:
        with initialize(version_base="1.3", config_path=None):
            return compose(CONFIG_NAME, overrides=overrides, return_hydra_config=with_hydra)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_hydra_problem(error)) from None
    finally:
        GlobalHydra.instance().clear()


def _hydra_problem(error: BaseException) -> str:
    """Keep the first sentence of Hydra's message, and name the option that was wanted."""
    message = str(error).strip() or str(error.__cause__)
    missing = re.search(r"Could not find '([^']+)'|Could not override '([^']+)'", message)
    if missing:
        wanted = missing.group(1) or missing.group(2)
        group, _, option = wanted.rpartition("/")
        if group in ALL_GROUPS:
            where = next((str(f.path) for f in source.loaded if f"{option}" in f.path.read_text("utf-8")), "config")
            return _unknown_options(group, (option,), source.shown(Path(where)))[0]
        known = [*ALL_GROUPS, *KNOBS]
        return f"there is no config group or key `{wanted}`.{did_you_mean(wanted, known)}"
    return message.split("\n\n")[0]


def _lenient(line: CommandLine) -> dict[str, str]:
    """Let every key be added, so that the check sees all unknown ones and not only Hydra's first."""
    out = {}
    for key, text in line.overrides.items():
        plain = key.lstrip("+~").split("@")[0]
        is_value = plain not in ALL_GROUPS and not plain.startswith(("hydra.", "hydra/")) and not key.startswith("~")
        out[plain if is_value else key] = f"++{text.lstrip('+')}" if is_value else text
    return out


def _space(line: CommandLine) -> dict[str, tuple[Any, ...]]:
    """Return the sweep's axes: key -> values, from the command line and from a sweep file."""
    axes: dict[str, tuple[Any, ...]] = {}
    parser = OverridesParser.create()
    plain = _lenient(line)
    for key, text in plain.items():
        override = parser.parse_override(text)
        if override.is_sweep_override():
            if not line.multirun:
                raise ConfigError(
                    f"{line.origins.get(key, text)}: several values are a sweep: add -m, "
                    f"or write a list as [a,b], or quote a comma that belongs to the value."
                )
            axes[key] = tuple(override.sweep_string_iterator())
    fixed = [t for k, t in plain.items() if k not in axes]
    if line.multirun or any(k.lstrip("+") in OVERLAYS for k in line.overrides):
        hydra = _compose(fixed, with_hydra=True).hydra
        params = OmegaConf.select(OmegaConf.create(OmegaConf.to_container(hydra.sweeper)), "params")
        is_multirun = line.multirun or str(hydra.mode or "").endswith("MULTIRUN")
        for key, value in (params or {}).items() if is_multirun else ():
            override = parser.parse_override(f"{key}={value}")
            if key not in line.overrides:
                line.origins.setdefault(str(key), _file_origin(f"hydra.sweeper.params.{key}"))
                axes[str(key)] = (
                    tuple(override.sweep_string_iterator()) if override.is_sweep_override() else (grammar(value),)
                )
    return axes


def _file_origin(key: str) -> str:
    for file in reversed(source.loaded):
        number = file.line_of(key)
        if number is None and "." in key:  # a key of a search space holds dots of its own
            head, _, leaf = key.partition("params.")
            number = _line_with(file.path, leaf) if head else None
        if number:
            return f"{source.shown(file.path)}:{number}"
    return "config"


def _line_with(path: Path, key: str) -> int | None:
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if re.match(rf"\s*['\"]?{re.escape(key)}['\"]?\s*:", text):
            return number
    return None


def _points(space: dict[str, tuple[Any, ...]]) -> Iterator[dict[str, str]]:
    """Yield the first point, then each further value of each axis beside the others' first."""
    first = {k: str(v[0]) for k, v in space.items()}
    yield first
    for key, values in space.items():
        for value in values[1:]:
            yield first | {key: str(value)}


def _check_points(line: CommandLine, space: dict[str, tuple[Any, ...]]) -> list[str]:
    plain = {k: t for k, t in _lenient(line).items() if k not in space}
    problems: list[str] = []
    for key in [k for k in space if k in ALL_GROUPS]:
        values = tuple(option_for(key, v) for v in space[key])
        problems += _unknown_options(key, tuple(x for v in values for x in _listed(v)), line.origins.get(key, "sweep"))
    if problems:
        return problems
    for number, point in enumerate(_points(space)):
        texts = [f"{'' if k in ALL_GROUPS else '++'}{k}={v}" for k, v in point.items()]
        problems += check_tree(_compose([*plain.values(), *texts]), lambda key: _origin(key, line))
        if number > 200:  # a sweep this long is checked further as its trials start
            break
    return problems


def _listed(value: Any) -> list[Any]:
    if isinstance(value, str) and value.startswith("["):
        return [v for v in value.strip("[]").split(",") if v]
    return value if isinstance(value, list) else [value]


def _origin(key: str, line: CommandLine) -> str:
    """Say where a key got its value: the command line, the JSON file, or a YAML file and line."""
    for prefix in (key, *(key.rsplit(".", n)[0] for n in range(1, key.count(".") + 1))):
        if prefix in line.origins:
            return line.origins[prefix]
    for file in reversed(source.loaded):
        number = file.line_of(key)
        if number:
            return f"{source.shown(file.path)}:{number}"
    return "config"
