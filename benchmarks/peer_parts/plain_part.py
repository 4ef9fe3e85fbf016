"""A script as people write it: transformers' Trainer, PEFT, the chat template, rows of like length together."""

from __future__ import annotations

from typing import Any

from meter import Meter, read_spec

GENERATION = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML, which says what of it is the answer: it and the token that ends it, as sftx learns."""


def lora(spec: dict[str, Any]) -> Any:
    """Return PEFT's adapter on all linear layers."""
    from peft import LoraConfig

    return LoraConfig(
        r=spec["rank"], lora_alpha=spec["alpha"], lora_dropout=0.0, target_modules=spec["targets"],
        task_type="CAUSAL_LM",
    )  # fmt: skip


def quantization(spec: dict[str, Any]) -> dict[str, Any]:
    """Return what loads a base in 4 bits, when that is asked."""
    if spec["mode"] != "qlora":
        return {}
    import torch
    from transformers import BitsAndBytesConfig

    four = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    return {"quantization_config": four}


def main() -> None:
    meter, spec = Meter("peft"), read_spec()
    meter.watch_trainer()
    import torch
    from peft import get_peft_model, prepare_model_for_kbit_training
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(spec["model_folder"])
    tokenizer.chat_template = GENERATION
    rows = _rows(spec, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(spec["model_folder"], dtype=torch.float32, **quantization(spec))
    if spec["mode"] == "qlora":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=spec["checkpointing"])
    if spec["mode"] != "full":
        if spec["checkpointing"]:
            model.enable_input_require_grads()
        model = get_peft_model(model, lora(spec))
    config = TrainingArguments(
        "out", per_device_train_batch_size=spec["batch"], gradient_accumulation_steps=spec["accumulation"],
        gradient_checkpointing=spec["checkpointing"], learning_rate=spec["rate"], lr_scheduler_type="constant",
        max_grad_norm=spec["clip"], weight_decay=0.0, num_train_epochs=1, max_steps=spec["steps"], seed=spec["seed"],
        use_cpu=True, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
        train_sampling_strategy="group_by_length" if spec["batching"] == "length_bucketed" else "random",
    )  # fmt: skip
    collator = DataCollatorForSeq2Seq(tokenizer, model=None, padding="longest")
    Trainer(model, config, train_dataset=rows, data_collator=collator, processing_class=tokenizer).train()


def _rows(spec: dict[str, Any], tokenizer: Any) -> Any:
    from datasets import load_dataset

    def encode(row: dict[str, Any]) -> dict[str, list[int]]:
        done = tokenizer.apply_chat_template(
            row["messages"], return_dict=True, return_assistant_tokens_mask=True, truncation=True,
            max_length=spec["length"],
        )  # fmt: skip
        ids = done["input_ids"]
        labels = [token if mine else -100 for token, mine in zip(ids, done["assistant_masks"], strict=True)]
        return {"input_ids": ids, "labels": labels}

    data = load_dataset("json", data_files=spec["messages"], split="train")
    return data.map(encode, remove_columns=data.column_names)


if __name__ == "__main__":
    main()
