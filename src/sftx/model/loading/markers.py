"""Control tokens that a chat template writes, and whether the tokenizer has them."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from sftx.data.encode.template import PROBE, ChatTemplate
from sftx.errors import ConfigError, ModelError

MARKER = re.compile(
    r"<[|｜][^<>\s]+?[|｜]>|</?s>|<(?:start|end)_of_\w+>|<reserved_\d+>|<(?:sop|eop|bos|eos|eod|eot)>|\[gMASK\]"
)
"""What no publisher writes as plain text by chance; `[INST]`, `USER:` and `### Instruction:` are plain text to many."""


def check_markers(template: ChatTemplate, *, model: str, own: bool) -> str | None:
    """Compare the control tokens that a template writes with the tokenizer's; return a remark, or None.

    A model's own template may write some as plain text before an answer, as Zephyr's does, but not in what is learned.

    Raises:
        ConfigError: the tokenizer lacks some, which would be learned as text.
    """
    prompt = template.render(PROBE[:1], generation_prompt=True)
    system = ""
    with suppress(ModelError):  # the template has no place for a system turn
        system = template.render([{"role": "system", "content": "System"}, *PROBE[:1]], generation_prompt=True)
    whole = template.render(PROBE, generation_prompt=False)
    answer = whole.removeprefix(prompt) if whole.startswith(prompt) else whole.rpartition(PROBE[-1]["content"])[2]
    before, learned = _lacking(template.tokenizer, system + prompt), _lacking(template.tokenizer, answer)
    if own and not learned:
        return f"the chat template writes {_listed(before)} as plain text: no tokens of this model." if before else None
    if missing := list(dict.fromkeys([*learned, *before])):
        raise ConfigError(
            f"template_name: the chat template ({template.origin}) writes {_listed(missing)}, which the tokenizer of "
            f"{model} does not have as tokens: they would be learned as text. Choose the template_name that this "
            f"model was made with" + (", or leave template_name out." if "template_name=" in template.origin else ".")
        )
    return None


def eos_tokens(folder: Path, tokenizer: Any) -> list[str]:
    """Return the tokens at which a model stops by its own account, such as gpt-oss's after a call.

    They are `eos_token_id` of its generation_config.json, else of its config.json.
    """
    for name in ("generation_config.json", "config.json"):
        with suppress(OSError, ValueError):  # a folder may lack one; who loads the model explains a damaged one
            found = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
            ids = found if isinstance(found, list) else [found]
            tokens = [tokenizer.convert_ids_to_tokens(i) for i in ids if type(i) is int and 0 <= i < len(tokenizer)]
            if tokens:
                return [t for t in tokens if t is not None]
    return []


def _lacking(tokenizer: Any, text: str) -> list[str]:
    """Return the markers in a rendered text that the tokenizer does not read as one token each."""
    vocabulary = tokenizer.get_vocab()
    found = dict.fromkeys(MARKER.findall(text))
    return [m for m in found if vocabulary.get(m) not in tokenizer.encode(m, add_special_tokens=False)]


def _listed(markers: list[str]) -> str:
    return ", ".join(markers[:3]) + (f" and {len(markers) - 3} more" if len(markers) > 3 else "")
