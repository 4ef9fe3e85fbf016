"""`README.md` of a run folder: the model card, with the command that made it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sftx.config.schema import TrainConfig
from sftx.model.loading.builtin import NAME as BUILTIN


def model_card(config: TrainConfig, manifest: dict[str, Any], final: Path, *, switch: str) -> str:
    """Return the card of a finished run as Markdown; `switch` is the template's argument about thinking."""
    result = manifest["result"]
    kind = "model" if config.train_mode == "full" else "LoRA adapter"
    rows = [
        ("base model", manifest["model"]["name"]),
        ("mode", config.train_mode),
        ("data", ", ".join(map(_corpus, manifest["data"]))),
        ("steps", str(result["steps"])),
        ("eval loss before", _number(result.get("eval_loss_before"))),
        ("eval loss after", _number(result.get("eval_loss"))),
        ("seed", str(config.seed)),
        ("git commit", manifest["environment"]["git"].get("commit", "none")),
    ]
    lines = [
        "---",
        "library_name: " + ("transformers" if config.train_mode == "full" else "peft"),
        f"base_model: {manifest['model']['name']}",
        "tags: [sftx, sft]",
        "---",
        "",
        f"# {kind} fine-tuned with sftx",
        "",
        "```",
        manifest["command"],
        "```",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
        "",
        "## Use",
        "",
        "```python",
        *_usage(config, final.absolute(), switch),
        "```",
        "",
        "`config.yaml` holds every setting, `manifest.json` versions, code, data hashes, hardware and each fallback.",
    ]
    return "\n".join(lines) + "\n"


def _corpus(facts: dict[str, Any]) -> str:
    if facts.get("streamed"):
        return f"{facts['path']} (streamed)"
    return f"{facts['path']} ({facts['rows']} rows, sha256 {facts['sha256'][:12]})"


def _usage(config: TrainConfig, final: Path, switch: str) -> list[str]:
    """Return code that loads `final/` from any directory; the embedded base is built again if its cache is gone."""
    folder = json.dumps(str(final), ensure_ascii=False)
    if config.train_mode == "full":
        imports, model = ["from transformers import AutoModelForCausalLM, AutoTokenizer"], "AutoModelForCausalLM"
    else:
        imports = ["from peft import AutoPeftModelForCausalLM", "from transformers import AutoTokenizer"]
        model = "AutoPeftModelForCausalLM"
        if config.model_name_or_path == BUILTIN:
            imports += [
                "from sftx.model.loading.builtin import ensure_builtin",
                "",
                "ensure_builtin()  # the base of this adapter",
            ]
    return [
        *imports,
        "",
        f"model = {model}.from_pretrained({folder})",
        f"tokenizer = AutoTokenizer.from_pretrained({folder})",
        'messages = [{"role": "user", "content": "Who are you?"}]',
        "inputs = tokenizer.apply_chat_template(",
        f'    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True{switch and ", " + switch}',
        ")",
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))",
    ]


def _number(value: float | None) -> str:
    return "not evaluated" if value is None else f"{value:.4f}"
