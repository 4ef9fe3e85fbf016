"""`python -m sftx.config.help.reference` writes docs/parameters.md: every key, group and option."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sftx.config.checks.signature import TargetNotFound, read_signature
from sftx.config.checks.types import describe
from sftx.config.composition.aliases import ALIASES, HALVES, OTHER_NAMES
from sftx.config.composition.yaml_file import read_yaml
from sftx.config.help.other_trainers import TABLE
from sftx.config.options import CONF, component_of, file_of, option_keys, options
from sftx.config.schema import GROUPS, KNOBS, LIST_GROUPS, OVERLAYS, TYPES
from sftx.config.values import show

HEAD = """# Parameters / 参数

<!-- Generated from the schema and conf/ by `make docs`; a test keeps it current. Do not edit. -->

Every key can be typed as `name=value`; `python train.py --help` prints a shorter form of this page.
每个参数都可以用 `名称=值` 的形式在命令行给出；`python train.py --help` 会显示本页的简版。
"""


def defaults() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the knobs' values and the groups' choices as `conf/train.yaml` has them."""
    tree = read_yaml(CONF / "train.yaml").body
    choices: dict[str, Any] = {}
    for entry in tree["defaults"]:
        if isinstance(entry, dict):
            choices |= entry
    return tree, choices


def knob_defaults() -> dict[str, Any]:
    """Return each knob's default; the keys that mirror a group's choice show that choice."""
    tree, choices = defaults()
    out: dict[str, Any] = {name: tree.get(name) for name in KNOBS}
    out |= {key: choices[group] for key, group in ALIASES.items()}
    return out | {key: choices["precision"] == key for key in HALVES}


def parameters() -> str:
    """Return the whole page."""
    lines = [HEAD, "## Keys / 参数", ""]
    lines += ["| key | default | type | meaning | 含义 |", "|---|---|---|---|---|"]
    values = knob_defaults()
    for name, knob in KNOBS.items():
        meanings = [_prose(knob.metadata["en"]), _prose(knob.metadata["zh"])]
        cells = [f"`{name}`", f"`{show(values[name])}`", describe(TYPES[name]), *meanings]
        lines.append(_row(cells))
    lines += ["", "## Groups / 配置组", ""]
    for name, group in GROUPS.items():
        lines += _group(name, group.metadata["en"], group.metadata["zh"])
    for name, (en, zh) in OVERLAYS.items():
        lines += _group(name, en, zh)
    lines += _other_trainers()
    return "\n".join(lines).rstrip() + "\n"


def _other_trainers() -> Iterator[str]:
    yield "## Names from other trainers / 其他训练框架的参数名"
    yield ""
    yield (
        "From Hugging Face, TRL, PEFT, LLaMA-Factory, axolotl and ms-swift; typing one of them is answered with "
        "sftx's. 取自 Hugging Face、TRL、PEFT、LLaMA-Factory、axolotl 与 ms-swift；误用时报错会给出 sftx 的写法。"
    )
    yield ""
    yield "| there | in sftx | remark | 说明 |"
    yield "|---|---|---|---|"
    for row in TABLE:
        names = ", ".join(f"`{name}`" for name in row.names.split())
        yield _row([names, f"`{row.ours}`" if row.ours else "none / 无", _prose(row.note), _prose(row.note_zh)])


def _group(name: str, en: str, zh: str) -> Iterator[str]:
    _, choices = defaults()
    yield f"### `{name}=`"
    yield ""
    yield f"{en[0].upper()}{en[1:]}. {zh}。"
    yield ""
    default = choices.get(name)
    aliases = [k for k, group in ALIASES.items() if group == name]
    if name in GROUPS:
        yield f"Default: `{name}={show(default)}`." + (" Several at once: `[a,b]`." if name in LIST_GROUPS else "")
    else:
        yield f"Default: `{name}=null`."
    if aliases:
        yield f"On the command line and in args_file also {' and '.join(f'`{k}=`' for k in aliases)}."
    others = [f"`{a}` = `{b}`" for a, b in OTHER_NAMES.get(name, {}).items()]
    if others:
        yield f"Other names: {', '.join(others)}."
    if name == "scheduler":
        yield ""
        yield "![The factor of learning_rate over the steps of a run, with 10 % of warm-up](schedules.svg)"
    yield ""
    for option in options(name):
        yield f"- **`{option}`**: {_prose(file_of(name, option).comment())}"
        yield from (_option_rows(name, option) if name in GROUPS else ())
    yield ""


def _option_rows(group: str, option: str) -> Iterator[str]:
    node = component_of(group, option)
    types = _types(node)
    for key in option_keys(group, option):
        yield f"  - `{_path(group, option)}.{key}`: `{show(node[key])}`" + (f", {types[key]}" if key in types else "")
    body = file_of(group, option).body
    sets = [f"`{k}={show(body[k])}`" for k in KNOBS if k in body and body is not node]
    if sets:
        yield f"  - also sets {', '.join(sets)}"


def _path(group: str, option: str) -> str:
    return f"{group}.{option}" if group in LIST_GROUPS else group


def _types(node: dict[str, Any]) -> dict[str, str]:
    try:
        signature = read_signature(str(node.get("_target_")))
    except TargetNotFound:
        return {}
    arguments = signature.arguments if signature else {}
    return {name: describe(a.kind) for name, a in arguments.items() if a.kind}


def _prose(text: str) -> str:
    """Keep Markdown from taking `<date>` for HTML."""
    return text.replace("<", "\\<")


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"


if __name__ == "__main__":
    print(parameters(), end="")
