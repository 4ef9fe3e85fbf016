"""The command line and the JSON argument file, read into one list of overrides with their origin."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, QuotedString
from hydra.errors import HydraException

from sftx.config.schema import GROUPS, LIST_GROUPS, OVERLAYS
from sftx.config.spellings import GROUP_OF_KEY, PRECISION_KEYS, Choices, Sweep, raise_if, rewrite, show
from sftx.errors import ConfigError

ALL_GROUPS = frozenset(GROUPS) | frozenset(OVERLAYS)
MOVED = {"hydra.run.dir": "output_dir"}
"""Hydra's own keys that mean one of ours."""


@dataclass
class CommandLine:
    """What was typed: Hydra's flags, then overrides in one spelling, each with where it came from."""

    flags: list[str]
    multirun: bool
    overrides: dict[str, str] = field(default_factory=dict)
    """key as typed (with `+`, `~`, `@package`) -> `key=value` in Hydra's grammar."""
    origins: dict[str, str] = field(default_factory=dict)
    """plain key -> how to name its origin in a message."""
    typed: set[str] = field(default_factory=set)
    """Plain keys that a person typed, on the command line or in the JSON file."""
    notes: list[str] = field(default_factory=list)


def read_command_line(argv: list[str]) -> CommandLine:
    """Read what follows `train.py`.

    Errors:
        ConfigError: an override that is not `key=value`, an unreadable JSON file, two spellings
        of one choice that disagree.
    """
    args, texts = get_args_parser().parse_known_args(_firefly_form(argv))
    texts = [*args.overrides, *(t for t in texts if not t.startswith("-"))]
    unknown = [t for t in argv if t.startswith("--") and not _is_flag(t)]
    raise_if([f"command line: `{t}` is no option of train.py; settings are typed as key=value." for t in unknown])
    files = [t.split("=", 1)[1] for t in texts if t.startswith("args_file=")]
    texts = [t for t in texts if not t.startswith("args_file=")]
    line = CommandLine(flags=[t for t in argv if _is_flag(t)], multirun=bool(args.multirun))
    line.flags = _flags_with_values(argv)
    problems: list[str] = []
    for file in files:
        _add(line, *_read_json(Path(file.strip("'\""))), problems)
    parsed, origins = _parse(texts, line.multirun, problems)
    _add(line, parsed, origins, problems)
    raise_if(problems)
    return line


def _firefly_form(argv: list[str]) -> list[str]:
    """Accept `--train_args_file my.json`, Firefly's way to name the JSON file."""
    out: list[str] = []
    words = iter(argv)
    for word in words:
        name, eq, value = word.partition("=")
        if name in ("--train_args_file", "--args_file"):
            out.append(f"args_file={value if eq else next(words, '')}")
        else:
            out.append(word)
    return out


_PARSER_ACTIONS = {o: a for a in get_args_parser()._actions for o in a.option_strings}
_OUR_FLAGS = ("--train_args_file", "--args_file")


def _is_flag(word: str) -> bool:
    name = word.split("=", 1)[0]
    return name in _PARSER_ACTIONS or name in _OUR_FLAGS


def _flags_with_values(argv: list[str]) -> list[str]:
    """Return Hydra's flags with the words that belong to them, in order."""
    out: list[str] = []
    i = 0
    while i < len(argv):
        name = argv[i].split("=", 1)[0]
        action = _PARSER_ACTIONS.get(name)
        if action is not None:
            out.append(argv[i])
            takes_word = action.nargs in (None, 1, "?") and "=" not in argv[i]
            if takes_word and i + 1 < len(argv) and "=" not in argv[i + 1] and not argv[i + 1].startswith("-"):
                out.append(argv[i + 1])
                i += 1
        i += 1
    return out


def _parse(texts: list[str], multirun: bool, problems: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Parse overrides; a value that Hydra's grammar refuses (Chinese, parentheses) is quoted for it."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for text in texts:
        override = _parse_one(text, multirun)
        if override is None:
            problems.append(
                f"command line: `{text}` is not an override. Wanted key=value, for example lora_rank=32; "
                f"no spaces around `=`, and quotes around the whole when the value has spaces."
            )
            continue
        key = _full_key(override)
        if key in values and key.lstrip("+~") == key:
            problems.append(f"command line: `{key}` is given twice: keep one.")
        values[key] = _value(override, multirun)
        origins[key.lstrip("+~").split("@")[0]] = f"command line: `{text}`"
    return values, origins


def _parse_one(text: str, multirun: bool) -> Override | None:
    parser = OverridesParser.create()
    try:
        return parser.parse_override(text)
    except HydraException:
        key, eq, value = text.partition("=")
        if not eq or not re.fullmatch(r"[+~]{0,2}[\w./@:-]+", key):
            return None
        quoted = ",".join(quote(v) for v in value.split(",")) if multirun else quote(value)
        try:
            return parser.parse_override(f"{key}={quoted}")
        except HydraException:
            return None


def _full_key(override: Override) -> str:
    text = override.input_line or ""
    return text.split("=", 1)[0]


def _value(override: Override, multirun: bool) -> Any:
    if override.is_delete() and override._value is None:
        return _DELETED
    if override.is_sweep_override():
        typed = override.value()
        if isinstance(typed, ChoiceSweep):
            choices = [_plain(v) for v in typed.list]
            as_list = not multirun and override.key_or_group in ("report_to", *LIST_GROUPS)
            return choices if as_list else Sweep(tuple(choices))
        return Sweep(tuple(override.sweep_iterator()))
    return _plain(override._value)


def _plain(value: Any) -> Any:
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {_plain(k): _plain(v) for k, v in value.items()}
    return value


_DELETED = object()


def _read_json(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Read the manual's JSON argument file: an object of the manual's names."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        values = json.loads(text)
    except OSError as error:
        raise ConfigError(f"args_file: cannot read {path}: {error.strerror or error}.") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}.") from None
    if not isinstance(values, dict):
        raise ConfigError(f'{path}: wanted an object such as {{"lora_rank": 32}}, found {type(values).__name__}.')
    lines = text.split("\n")
    origins = {}
    for key in values:
        number = next((n for n, line in enumerate(lines, 1) if f'"{key}"' in line), 1)
        origins[key] = f"{path}:{number}"
    return values, origins


def _add(line: CommandLine, values: dict[str, Any], origins: dict[str, str], problems: list[str]) -> None:
    """Rewrite one source to one spelling and lay it over what is there; the later source wins."""
    values = {MOVED.get(k, k): v for k, v in values.items()}
    where = (
        "command line"
        if any("command line" in o for o in origins.values())
        else next((o.rsplit(":", 1)[0] for o in origins.values()), "")
    )
    choices: Choices = rewrite(values, where, ALL_GROUPS)
    problems += choices.problems
    line.notes += choices.notes
    for key, origin in origins.items():
        plain = "precision" if key in PRECISION_KEYS else GROUP_OF_KEY.get(key, key)
        line.origins[plain] = origin
        line.typed.add(plain)
    for key, value in (choices.values | choices.groups).items():
        if key in LIST_GROUPS and not isinstance(value, Sweep):
            value = _as_list(value)
        plain = key.lstrip("+~").split("@")[0]
        for old in [k for k in line.overrides if k.lstrip("+~").split("@")[0] == plain]:
            del line.overrides[old]
        line.overrides[key] = key if value is _DELETED else f"{key}={grammar(value)}"


def _as_list(value: Any) -> list[Any]:
    items = value if isinstance(value, list) else [v for v in str(value).strip("[]").split(",") if v]
    return [v for v in items if v not in ("none", None)]


def quote(text: str) -> str:
    """Quote text for Hydra's grammar."""
    escaped = re.sub(r"(\\*)'", lambda m: m.group(1) * 2 + "\\'", text)
    trailing = len(escaped) - len(escaped.rstrip("\\"))
    return f"'{escaped}{chr(92) * trailing}'"


def grammar(value: Any) -> str:
    """Write a value in Hydra's override grammar."""
    if isinstance(value, Sweep):
        return ",".join(grammar(v) for v in value.values)
    if isinstance(value, list | tuple):
        return "[" + ",".join(grammar(v) for v in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{k}:{grammar(v)}" for k, v in value.items()) + "}"
    if isinstance(value, str):
        simple = re.fullmatch(r"[A-Za-z_/][\w./:\-]*", value)
        reserved = value.lower() in ("true", "false", "null", "nan", "inf")
        return value if simple and not reserved else quote(value)
    if isinstance(value, float):
        return repr(value)
    return show(value)
