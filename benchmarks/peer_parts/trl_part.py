"""TRL: `SFTTrainer` with the loss on the answer, packed into sequences of the longest length where that is asked."""

from __future__ import annotations

from meter import Meter, read_spec
from plain_part import GENERATION, lora, quantization


def main() -> None:
    meter, spec = Meter("trl", "peft"), read_spec()
    meter.watch_trainer()
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    packed = spec["batching"] == "packed"
    tokenizer = AutoTokenizer.from_pretrained(spec["model_folder"])
    tokenizer.chat_template = GENERATION
    config = SFTConfig(
        output_dir="out", max_length=spec["length"], packing=packed, assistant_only_loss=True,
        # Packs laid end to end would be one sequence with a mask of all its tokens squared.
        per_device_train_batch_size=1 if packed else spec["batch"],
        gradient_accumulation_steps=spec["accumulation"], gradient_checkpointing=spec["checkpointing"],
        learning_rate=spec["rate"], lr_scheduler_type="constant", max_grad_norm=spec["clip"], weight_decay=0.0,
        num_train_epochs=1, max_steps=spec["steps"], seed=spec["seed"], bf16=False, use_cpu=True, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True,
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa", **quantization(spec)},
    )  # fmt: skip
    data = load_dataset("json", data_files=spec["messages"], split="train")
    peft = lora(spec) if spec["mode"] != "full" else None
    trainer = SFTTrainer(
        spec["model_folder"], args=config, train_dataset=data, peft_config=peft, processing_class=tokenizer
    )
    trainer.train()


if __name__ == "__main__":
    main()
