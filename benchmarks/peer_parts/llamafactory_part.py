"""LLaMA-Factory: `run_exp`, packed by `neat_packing` (rows do not see each other) where that is asked."""

from __future__ import annotations

import importlib.machinery
import sys
import types

from meter import Meter, read_spec


def main() -> None:
    meter, spec = Meter("llamafactory", "peft"), read_spec()
    audio = types.ModuleType("torchaudio")  # it is imported at once, and the package index's needs CUDA
    audio.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    sys.modules.setdefault("torchaudio", audio)
    meter.watch_trainer()
    from llamafactory.data.formatter import StringFormatter
    from llamafactory.data.template import register_template
    from llamafactory.train.tuner import run_exp

    register_template(  # as `qwen`, but the line break after the answer is not learned
        name="same",
        format_user=StringFormatter(slots=["<|im_start|>user\n{{content}}<|im_end|>\n<|im_start|>assistant\n"]),
        format_assistant=StringFormatter(slots=["{{content}}<|im_end|>"]),
    )
    packed = spec["batching"] == "packed"
    settings = {
        "model_name_or_path": spec["model_folder"], "stage": "sft", "do_train": True, "template": "same",
        "dataset": "rows", "dataset_dir": spec["data_folder"], "cutoff_len": spec["length"], "packing": packed,
        "neat_packing": packed, "per_device_train_batch_size": 1 if packed else spec["batch"],
        "gradient_accumulation_steps": spec["accumulation"],
        "disable_gradient_checkpointing": not spec["checkpointing"], "learning_rate": spec["rate"],
        "lr_scheduler_type": "constant", "max_grad_norm": spec["clip"], "weight_decay": 0.0, "num_train_epochs": 1.0,
        "max_steps": spec["steps"], "seed": spec["seed"], "output_dir": "out", "use_cpu": True, "bf16": False,
        "fp16": False, "flash_attn": "sdpa", "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "finetuning_type": "full",
    }  # fmt: skip
    if spec["mode"] != "full":
        settings |= {
            "finetuning_type": "lora", "lora_rank": spec["rank"], "lora_alpha": spec["alpha"], "lora_dropout": 0.0,
            "lora_target": ",".join(spec["targets"]),
        }  # fmt: skip
    if spec["mode"] == "qlora":
        settings |= {"quantization_bit": 4, "quantization_method": "bnb", "double_quantization": True}
    run_exp(settings)


if __name__ == "__main__":
    main()
