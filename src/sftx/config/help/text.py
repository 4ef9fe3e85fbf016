"""`sftx train --help`: every key with its default and meaning, in English or, by LANG, in Chinese."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence

from sftx import __version__, train_command
from sftx.config.checks.types import bounds_of, options_of
from sftx.config.help.reference import defaults, knob_defaults
from sftx.config.options import options
from sftx.config.schema import GROUPS, KNOBS, OVERLAYS, TYPES
from sftx.config.values import show

EXAMPLES = (
    ("-m learning_rate=1e-4,2e-4 lora_rank=8,16", "a sweep: comma lists and -m", "多组试验"),
    ("args_file=my.json", "the manual's JSON argument file", "手册的 JSON 参数文件"),
    ("--cfg job", "print the configuration, run nothing", "只打印配置"),
)


def asks_for_help(argv: Sequence[str]) -> bool:
    """Return True if the user asks for sftx's own help (`--hydra-help` is Hydra's)."""
    return any(a in ("--help", "-h") for a in argv)


def chinese() -> bool:
    """Return True if the user's language is Chinese."""
    return any(os.environ.get(v, "").lower().startswith("zh") for v in ("LC_ALL", "LC_MESSAGES", "LANG"))


def help_text() -> str:
    """Return the whole help."""
    zh, program = chinese(), train_command()
    values, (_, choices) = knob_defaults(), defaults()
    lines = [
        f"sftx {__version__} - " + ("有监督微调" if zh else "supervised fine-tuning"),
        "",
        f"  {program} mode=qlora lora_rank=32",
        *(f"  {f'{program} {words}':<65}{zh_text if zh else en}" for words, en, zh_text in EXAMPLES),
        "",
        "参数（键=默认值）" if zh else "Keys (key=default)",
    ]
    for name, knob in KNOBS.items():
        allowed = options_of(TYPES[name]) + [b.symbols() for b in bounds_of(TYPES[name])]
        meaning = knob.metadata["zh" if zh else "en"]
        if allowed:
            meaning += f" [{' | '.join(allowed)}]"
        head = f"  {name}={show(values[name])}"
        lines += _entry(head, meaning)
    lines += ["", "配置组（组=默认选项）" if zh else "Groups (group=default option)"]
    meanings = {name: group.metadata["zh" if zh else "en"] for name, group in GROUPS.items()}
    meanings |= {name: texts[zh] for name, texts in OVERLAYS.items()}
    for name, meaning in meanings.items():
        lines += _entry(f"  {name}={show(choices.get(name))}", f"{meaning}: {', '.join(options(name))}")
    lines += ["", "--hydra-help: Hydra's own flags" if not zh else "--hydra-help：Hydra 自带的选项"]
    return "\n".join(lines)


def _entry(head: str, meaning: str) -> list[str]:
    wrapped = textwrap.wrap(meaning, 76) or [""]
    first = f"{head:<40}  {wrapped[0]}" if len(head) <= 40 else f"{head}\n{' ' * 42}{wrapped[0]}"
    return [first, *(" " * 42 + line for line in wrapped[1:])]
