"""ms-swift: its `sft_main`."""

from __future__ import annotations

from meter import Meter, read_spec


def main() -> None:
    meter, spec = Meter("ms-swift", "peft"), read_spec()
    meter.watch_trainer()
    from swift.pipelines import sft_main
    from swift.template.register import register_template
    from swift.template.templates.utils import ChatmlTemplateMeta

    register_template(ChatmlTemplateMeta("same", suffix=["<|im_end|>"]))  # the line break after it is not learned
    packed = spec["batching"] == "packed"
    settings = {
        "model": spec["model_folder"], "model_type": spec["family"], "template": "same", "system": "",
        "dataset": spec["messages"], "split_dataset_ratio": 0, "torch_dtype": "float32", "attn_impl": "sdpa",
        "max_length": spec["length"], "truncation_strategy": "right", "packing": packed,
        "per_device_train_batch_size": 1 if packed else spec["batch"],
        "gradient_accumulation_steps": spec["accumulation"], "gradient_checkpointing": spec["checkpointing"],
        "learning_rate": spec["rate"], "lr_scheduler_type": "constant", "warmup_ratio": 0, "weight_decay": 0,
        "adam_beta2": 0.999, "max_grad_norm": spec["clip"], "num_train_epochs": 1, "max_steps": spec["steps"],
        "seed": spec["seed"], "output_dir": "out", "use_cpu": True, "use_hf": True, "logging_steps": 1,
        "save_strategy": "no", "eval_strategy": "no", "report_to": "none", "dataloader_num_workers": 0,
        "tuner_type": "full",
        "group_by_length": spec["batching"] == "length_bucketed",
    }  # fmt: skip
    if spec["mode"] != "full":
        settings |= {
            "tuner_type": "lora", "lora_rank": spec["rank"], "lora_alpha": spec["alpha"], "lora_dropout": 0,
            "target_modules": "all-linear",
        }  # fmt: skip
    if spec["mode"] == "qlora":
        settings |= {"quant_method": "bnb", "quant_bits": 4, "bnb_4bit_compute_dtype": "float32"}
    words = [word for name, value in settings.items() for word in (f"--{name}", _word(value))]
    sft_main(words)


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    main()
