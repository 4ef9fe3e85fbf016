"""The command line and the JSON argument file, read into one set of settings with their origin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Glob

from sftx import train_command
from sftx.config.checks.types import is_text
from sftx.config.composition.aliases import plain_name, resolve_precision, translate
from sftx.config.composition.args_file import read_args_file
from sftx.config.composition.grammar import grammar, read_override, unwritable_name
from sftx.config.help.other_trainers import counterpart
from sftx.config.options import ALL_GROUPS, options
from sftx.config.schema import GROUPS, KNOBS, LIST_GROUPS, TYPES
from sftx.config.untrusted.file_keys import file_problems
from sftx.config.values import Deleted, Sweep, show
from sftx.errors import did_you_mean

MOVED = {"hydra.run.dir": "output_dir"}
"""Hydra's own keys that mean one of ours."""
ARGS_FILE = ("--train_args_file", "--args_file")
CONFIG_DIR = ("--config-dir", "-cd")
SHORT = {
    "-h": "--help", "-c": "--cfg", "-p": "--package", "-r": "--run", "-m": "--multirun", "-sc": "--shell-completion",
    "-i": "--info",
}  # fmt: skip
FLAGS = SHORT | {flag: flag for flag in (*SHORT.values(), "--hydra-help", "--version", "--resolve")}
TAKE_A_WORD = ("--cfg", "--package", "--info")
CFG = ("job", "hydra", "all")
NOT_OURS = {
    "--config-name": "the one primary config is conf/train.yaml: write an experiment and choose it by experiment=NAME",
    "--config-path": "folders of your own are given by --config-dir FOLDER",
    "--experimental-rerun": "it reads a pickle, which can run anything; type the command in the run's manifest.json",
}
NOT_OURS |= {"-cn": NOT_OURS["--config-name"], "-cp": NOT_OURS["--config-path"]}


@dataclass
class CommandLine:
    """What was typed: Hydra's flags, then settings in one spelling, each with where it came from."""

    flags: list[str] = field(default_factory=list)
    multirun: bool = False
    shows: bool = False
    """True when the configuration is only shown: `--cfg`, `--info`."""
    bypass: bool = False
    """True when Hydra answers without a configuration: `--hydra-help`, shell completion."""
    completes: bool = False
    """True for shell completion."""
    folders: list[Path] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    """The overrides as they were typed."""
    values: dict[str, Any] = field(default_factory=dict)
    """key -> its plain value, a `Sweep` of them, or `Deleted`; Hydra's own keys keep their prefix."""
    origins: dict[str, str] = field(default_factory=dict)
    """key -> how to name its origin in a message."""
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def origin(self, key: str) -> str:
        """Name the origin of a typed key."""
        return self.origins.get(bare(key), "command line")


def bare(key: str) -> str:
    """Return a key without prefix and package."""
    return key.lstrip("+~").split("@")[0]


def override_text(key: str, value: Any) -> str:
    """Write one setting as Hydra reads it."""
    if isinstance(value, Deleted):
        return f"~{key.lstrip('~')}" + (f"={grammar(value.value)}" if value.value is not None else "")
    return f"{key}={grammar(value)}"


def read_command_line(argv: list[str]) -> CommandLine:
    """Read what follows `train.py`; what is wrong with it is in `problems`."""
    line = CommandLine()
    line.texts, files = _sort_words(argv, line)
    for file in files:
        read = read_args_file(file)
        line.problems += read.problems + file_problems(read.values, read.place)
        _add(line, read.values, read.places)
    _add(line, *_read_overrides(line.texts, line))
    return line


def _sort_words(argv: list[str], line: CommandLine) -> tuple[list[str], list[str]]:
    """Sort the words into Hydra's flags, which go into `line`, and return the overrides and the JSON files."""
    texts: list[str] = []
    files: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if name in (*ARGS_FILE, *CONFIG_DIR):
            given = value if equals else (words.pop(0) if words else "")
            if name in ARGS_FILE:
                files.append(given)
            elif given and Path(given).is_dir():
                line.folders.append(Path(given).resolve())
            else:
                line.problems.append(f"command line: `{name} {given}`: no such folder.")
        elif name in NOT_OURS:
            line.problems.append(f"command line: `{name}`: {NOT_OURS[name]}.")
            if not equals and words:
                words.pop(0)
        elif name in FLAGS:
            _take_flag(word, words, line)
        elif name == "args_file":
            files.append(value.strip("'\""))
        elif word.startswith("--") or (word.startswith("-") and not equals):
            line.problems.append(_unknown_flag(word, words, [*FLAGS, *ARGS_FILE]))
        else:
            texts.append(word)
    return texts, files


def _unknown_flag(word: str, words: list[str], flags: list[str]) -> str:
    """Return the message for `--lora_rank 8`, as other trainers are called; the value is taken from `words`."""
    name, equals, value = word.partition("=")
    key = name.lstrip("-").replace("-", "_")
    row = counterpart(key)
    if key not in KNOBS and row is None:
        hint = did_you_mean(name, flags)
        return f"command line: `{word}` is not an option of {train_command()}; settings are typed as key=value.{hint}"
    if not equals and words and "=" not in words[0] and not words[0].startswith("--"):
        value = words.pop(0)
    head = f"command line: `{word}`: settings are typed without dashes"
    return (
        f"{head}: {key}={value or 'VALUE'}" if key in KNOBS or row is None else f"{head}, as key=value. {row.answer()}"
    )


def _take_flag(word: str, words: list[str], line: CommandLine) -> None:
    typed, equals, value = word.partition("=")
    flag = FLAGS[typed]
    if flag == "--run":
        return  # what happens without flags
    line.flags.append(word)
    if flag in TAKE_A_WORD and not equals and words and "=" not in words[0] and not words[0].startswith("-"):
        value = words.pop(0)
        line.flags.append(value)
    line.multirun |= flag == "--multirun"
    line.shows |= flag in ("--cfg", "--info")
    line.completes |= flag == "--shell-completion"
    line.bypass |= flag in ("--hydra-help", "--shell-completion", "--version")
    if flag == "--cfg" and value not in CFG:
        line.problems.append(
            f"command line: `{typed}`: expected one of {', '.join(CFG)}, got {value or 'nothing'}."
            f"{did_you_mean(value, CFG)}"
        )


def _read_overrides(texts: list[str], line: CommandLine) -> tuple[dict[str, Any], dict[str, str]]:
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for text in texts:
        typed = read_override(text, multirun=line.multirun)
        if typed is None:
            line.problems.append(
                f"command line: `{text}` is not an override. Wanted key=value, for example lora_rank=32; "
                f"no spaces around `=`, and quotes around the whole when the value has spaces."
            )
            continue
        name = unwritable_name(typed.value) if isinstance(typed.value, str) else None
        if name is not None and not is_text(TYPES.get(typed.name)):
            group, _, key = typed.name.partition(".")
            line.problems.append(
                f"command line: `{text}`: `{name}` cannot stand before a colon on the command line, where names are "
                f"letters without accents, digits and `_`. Write conf/experiment/mine.yaml with the line "
                f"`{group}: {{{key}: {{{name}: ...}}}}` and type experiment=mine."
            )
            continue
        if isinstance(typed.value, Deleted) and _cannot_go(plain_name(typed.name)):
            line.problems.append(f"command line: `{text}`: `{typed.name}` cannot be taken out: every run needs it.")
            continue
        is_hydra = bare(typed.name).startswith(("hydra.", "hydra/")) or "@" in typed.name
        key = typed.prefix.replace("~", "") + typed.name if is_hydra else typed.name
        origin = f"command line: `{text}`"
        value = _as_typed(key, typed.value, text.partition("=")[2], multirun=line.multirun)
        if key in values and values[key] != value:
            line.problems.append(f"{origin}: `{key}` is given twice, first as `{show(values[key])}`: keep one.")
        values[key] = value
        origins[key] = origin
    return values, origins


def _cannot_go(key: str) -> bool:
    return (key in KNOBS or key in GROUPS) and key not in LIST_GROUPS


def _as_typed(key: str, value: Any, raw: str, *, multirun: bool) -> Any:
    """Convert a typed value to what its key expects."""
    if isinstance(value, Deleted) and plain_name(key) in ALL_GROUPS:
        return [] if plain_name(key) in LIST_GROUPS else None
    if isinstance(value, Glob):
        return Sweep(tuple(value.filter(options(plain_name(key)))))
    if isinstance(value, Sweep) and not multirun and plain_name(key) in LIST_GROUPS:
        return list(value.values)  # report_to=tensorboard,wandb
    if key in KNOBS and is_text(TYPES[key]) and isinstance(value, bool | int | float):
        return raw.strip()  # output_dir=2024 is a name
    return value


def _add(line: CommandLine, values: dict[str, Any], origins: dict[str, str]) -> None:
    """Translate the aliases of one source and lay it over what is there; the later source wins."""
    values = {MOVED.get(k, k): v for k, v in values.items()}
    origins = {MOVED.get(k, k): o for k, o in origins.items()}
    choices = translate(values, lambda key: origins.get(key, "command line"), ALL_GROUPS)
    line.problems += choices.problems
    line.notes += choices.notes
    for key, value in (choices.values | choices.groups).items():
        written = next((k for k in values if plain_name(k) == key and not isinstance(values[k], Mapping)), key)
        below = line.values.get(key)
        if isinstance(below, str) and key == "precision":  # chosen by the JSON file
            value = resolve_precision(value, below)
        for old in [k for k in line.values if bare(k) == bare(key)]:
            del line.values[old]
        line.values[key] = value
        line.origins[bare(key)] = origins[written]
