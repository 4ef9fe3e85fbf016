"""litgpt: `setup` of its LoRA or full fine-tuning, which clips no gradients and is padded.

`litgpt_part.py convert` first makes its form of the checkpoint.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from meter import Meter, read_spec


def convert(spec: dict[str, Any]) -> None:
    """Make the checkpoint that litgpt reads, once for a model."""
    import torch
    from litgpt.config import Config
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama, copy_weights_qwen_2_5
    from litgpt.utils import save_config
    from safetensors.torch import load_file

    theirs, folder = Path(spec["model_folder"]), Path(spec["litgpt_folder"])
    facts = json.loads((theirs / "config.json").read_text(encoding="utf-8"))
    rope = facts.get("rope_theta") or facts["rope_parameters"]["rope_theta"]
    shape = {
        "vocab_size": facts["vocab_size"], "padded_vocab_size": facts["vocab_size"], "n_embd": facts["hidden_size"],
        "n_layer": facts["num_hidden_layers"], "n_head": facts["num_attention_heads"], "rope_base": int(rope),
        "n_query_groups": facts["num_key_value_heads"], "intermediate_size": facts["intermediate_size"],
        "block_size": 2048, "norm_eps": facts["rms_norm_eps"],
    }  # fmt: skip
    qwen = spec["family"] == "qwen2"
    config = Config.from_name("Qwen2.5-0.5B" if qwen else "SmolLM2-135M", **shape)
    weights: dict[str, Any] = {}
    loaded = load_file(theirs / "model.safetensors")
    if qwen:
        copy_weights_qwen_2_5(config, {}, weights, loaded)
    else:
        copy_weights_hf_llama(config, {}, weights, loaded)
    weights.setdefault("lm_head.weight", weights["transformer.wte.weight"])
    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, folder)
    shutil.copy(theirs / "tokenizer.json", folder)
    words = json.loads((theirs / "tokenizer_config.json").read_text(encoding="utf-8"))
    words.pop("bos_token", None)  # a text that begins with it, as a turn of SmolLM2 does, would lose it
    (folder / "tokenizer_config.json").write_text(json.dumps(words), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": facts["eos_token_id"]}))
    torch.save(weights, folder / "lit_model.pth")


def main() -> None:
    spec = read_spec()
    if sys.argv[1:] == ["convert"]:
        convert(spec)
        return
    meter = Meter("litgpt")
    import torch
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.data import JSON
    from litgpt.prompts import PromptStyle

    if spec["mode"] == "full":
        import litgpt.finetune.full as trainer
    else:
        import litgpt.finetune.lora as trainer

    class ChatML(PromptStyle):
        def apply(self, prompt: str, *, sys_prompt: str | None = None, **_: Any) -> str:
            return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"

    for name in ("generate_example", "merge_lora", "save_hyperparameters"):  # what comes beside training
        setattr(trainer, name, lambda *_, **__: None)
    trainer.validate = lambda *_, **__: torch.tensor(0.0)
    trainer.get_lr_scheduler = lambda optimizer, **_: torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    adapter = {}
    if spec["mode"] != "full":
        parts = ("query", "key", "value", "projection", "mlp")
        adapter = {f"lora_{part}": True for part in parts}
        adapter |= {"lora_r": spec["rank"], "lora_alpha": spec["alpha"], "lora_dropout": 0.0}
        adapter |= {"quantize": "bnb.nf4-dq"} if spec["mode"] == "qlora" else {}
    _count(meter, trainer)
    meter.watch_optimizers()
    trainer.setup(
        Path(spec["litgpt_folder"]), out_dir=Path("out"), precision="32-true", devices=1, seed=spec["seed"],
        data=JSON(json_path=_data(spec), mask_prompt=True, prompt_style=ChatML(), num_workers=0),
        train=TrainArgs(
            save_interval=10**6, log_interval=1, global_batch_size=spec["batch"] * spec["accumulation"],
            micro_batch_size=spec["batch"], lr_warmup_steps=0, epochs=1, max_seq_length=spec["length"],
            max_steps=spec["steps"] if spec["steps"] > 0 else None,
        ),
        eval=EvalArgs(interval=10**6, max_iters=1, max_new_tokens=1, final_validation=False),
        optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": spec["rate"], "weight_decay": 0.0}},
        **adapter,
    )  # fmt: skip


def _data(spec: dict[str, Any]) -> Path:
    """Make the folder that litgpt reads; it wants rows to validate on, which are not used."""
    folder = Path("rows")
    folder.mkdir(exist_ok=True)
    shutil.copy(Path(spec["data_folder"]) / "rows.json", folder / "train.json")
    (folder / "val.json").write_text(json.dumps([{"instruction": "?", "output": "."}] * 8))
    return folder


def _count(meter: Meter, trainer: Any) -> None:
    """Count the micro-batches and losses; a row is padded with 0, which no row holds."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    forward, loss_of = trainer.GPT.forward, trainer.chunked_cross_entropy
    window: list[tuple[float, int]] = []

    def counted(self: Any, ids: Any, *rest: Any, **named: Any) -> Any:
        meter.batch(int((ids != 0).sum()), 0, ids.numel())
        return forward(self, ids, *rest, **named)

    def measured(logits: Any, targets: Any, *rest: Any, **named: Any) -> Any:
        loss = loss_of(logits, targets, *rest, **named)
        supervised = int((targets != -100).sum())
        meter.count["supervised"] += supervised
        window.append((float(loss.detach()), supervised))
        return loss

    def ended(*_: Any) -> None:
        meter.losses.append(sum(loss * count for loss, count in window) / sum(count for _, count in window))
        window.clear()

    trainer.GPT.forward, trainer.chunked_cross_entropy = counted, measured
    register_optimizer_step_post_hook(ended)


if __name__ == "__main__":
    main()
