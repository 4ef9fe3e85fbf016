"""Names from other trainers are answered with sftx's key, in errors and in the docs, from one table."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from sftx import PROJECT_ROOT
from sftx.config.checks.check import _keys_of_options
from sftx.config.composition.prepare import prepare
from sftx.config.help.other_trainers import TABLE, counterpart
from sftx.config.options import ALL_GROUPS, options
from sftx.config.schema import GROUPS, KNOBS
from sftx.errors import ConfigError

ASKED = {
    "lr": "learning_rate", "epochs": "num_train_epochs", "r": "lora_rank", "lora_r": "lora_rank",
    "batch_size": "per_device_train_batch_size", "warmup_ratio": "warmup_steps",
    "eval_strategy": "eval_steps", "deepspeed": "parallel=zero3", "resume_from_checkpoint": "resume",
    "cutoff_len": "max_seq_length", "micro_batch_size": "per_device_train_batch_size", "finetuning_type": "mode",
    "load_in_4bit": "mode=qlora", "packing": "batching=packed", "val_size": "eval_ratio", "dataset": "train_file_name",
    "torch_dtype": "precision", "base_model": "model_name_or_path", "template": "template_name", "use_dora": "",
    "target_modules": "lora_target_modules", "lora_target": "lora_target_modules", "push_to_hub": "", "neftune_noise_alpha": "",
}  # fmt: skip


def problems(*argv: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        prepare(list(argv))
    return error.value.problems


def test_a_name_from_another_trainer_is_answered_with_our_key(tmp_path: Path):
    """From the command line, a JSON file (nested too) and below a group."""
    found = problems(*(f"{name}=1" for name in ASKED))
    for name, ours in ASKED.items():
        [said] = [p for p in found if f"unknown key `{name}`" in p]
        assert (f"In sftx it is `{ours}`" if ours else "sftx has no such setting: ") in said, said
        assert "Did you mean" not in said
    (tmp_path / "a.json").write_text('{"deepspeed": {"zero_optimization": {"stage": 3}}}', encoding="utf-8")
    assert "a.json:1: unknown key `deepspeed`" in (said := problems(f"args_file={tmp_path}/a.json")[0])
    assert "In sftx it is `parallel=zero3`" in said
    assert "In sftx it is `learning_rate`" in problems("optimizer.lr=1e-4")[0]
    assert "In sftx it is `lora_rank`" in problems("mode.r=8")[0]


def test_flags_with_dashes_are_answered_with_how_it_is_typed():
    """`--learning_rate 1e-4 --lora-r=8`: as most other trainers are called; the word after a flag is its value."""
    found = problems("--learning_rate", "1e-4", "--lora-r=8", "--max_steps", "2", "--nonsense")
    assert found == [
        "command line: `--learning_rate`: settings are typed without dashes: learning_rate=1e-4",
        "command line: `--lora-r=8`: settings are typed without dashes, as key=value. In sftx it is `lora_rank`.",
        "command line: `--max_steps`: settings are typed without dashes: max_steps=2",
        "command line: `--nonsense` is not an option of python train.py; settings are typed as key=value.",
    ]


def test_a_model_typed_as_the_group_is_answered_with_the_key_of_its_name():
    assert "the model itself is model_name_or_path=Qwen/Qwen2-7B" in problems("model=Qwen/Qwen2-7B")[0]


def test_the_table_names_nothing_of_ours_and_answers_with_what_exists():
    names = [name for row in TABLE for name in row.names.split()]
    assert len(names) == len(set(names)), sorted(n for n in names if names.count(n) > 1)
    assert not [n for n in (*KNOBS, *ALL_GROUPS) if n in names]
    for row in TABLE:
        assert row.ours or row.note, row
        assert bool(row.note) == bool(row.note_zh), row
        key, _, value = row.ours.partition("=")
        group, _, inner = key.partition(".")
        if not key:
            continue
        assert key in KNOBS or key in GROUPS or inner.split(".")[-1] in _keys_of_options(group), row
        if value and key in GROUPS:
            assert value in options(key), row


def test_all_of_hugging_faces_training_arguments_are_answered():
    from transformers import TrainingArguments

    names = [f.name for f in dataclasses.fields(TrainingArguments)]
    assert [n for n in names if n not in (*KNOBS, *ALL_GROUPS) and counterpart(n) is None] == []


def test_the_docs_have_the_whole_table():
    page = (PROJECT_ROOT / "docs/parameters.md").read_text(encoding="utf-8")
    section = page.partition("## Names from other trainers")[2]
    for row in TABLE:
        for name in row.names.split():
            assert re.search(rf"`{re.escape(name)}`", section), name
