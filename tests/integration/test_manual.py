"""Every row of the manual's table, typed on the command line by its own name, takes effect.

Each test looks at what the knob governs (a tensor, a row, a file, an optimizer), never at the config.
`test_no_row_is_left_out` keeps the table complete.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from tests.conftest import ROOT

from sftx.run import run
from sftx.training.saving.metrics import read_metrics

MANUAL = {
    "output_dir", "model_name_or_path", "train_file_path", "train_file_name", "template_name", "train_mode",
    "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "max_seq_length",
    "logging_steps", "save_steps", "save_strategy", "save_total_limit", "lr_scheduler_type", "warmup_steps", "lora_rank",
    "lora_alpha", "lora_dropout", "gradient_checkpointing", "disable_tqdm", "optim", "seed", "fp16", "report_to",
    "dataloader_num_workers", "weight_decay", "max_grad_norm", "remove_unused_columns",
}  # fmt: skip


def test_no_row_is_left_out(shared_data: Path) -> None:
    """The manual's table, this file's tests and the schema name the same knobs."""
    from sftx.config.schema import KNOBS

    table = (shared_data.parent / "design" / "manual.md").read_text(encoding="utf-8").splitlines()
    rows = {line.split("`")[1] for line in table if line.startswith("| `")}
    assert rows == MANUAL
    assert set(KNOBS) >= MANUAL
    tested = {n.removeprefix("test_") for n in globals() if n.startswith("test_")}
    assert tested >= MANUAL


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A corpus of ten rows with a column of its own."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    lines = ["category,human,assistant,note"] + [f"c{i % 2},question {i}?,answer {i}.,n{i}" for i in range(10)]
    (folder / "mine.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def records(config) -> list[dict[str, float]]:
    return read_metrics(Path(config.output_dir) / "metrics.jsonl")


def test_output_dir(make_config, tmp_path: Path) -> None:
    run([make_config(f"output_dir={tmp_path / 'here'}", "max_steps=1", "max_seq_length=1024")])
    names = {p.name for p in (tmp_path / "here").iterdir()}
    assert names == {"config.yaml", "manifest.json", "metrics.jsonl", "train.log", "final", "README.md"}


def test_model_name_or_path(make_config, captured, tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from sftx.model.loading.builtin import ensure_builtin

    folder = tmp_path / "other"
    import shutil

    shutil.copytree(ensure_builtin(), folder)
    config = Qwen2Config.from_pretrained(folder)
    config.num_hidden_layers, config.layer_types = 2, config.layer_types[:2]
    Qwen2ForCausalLM(config).save_pretrained(folder)
    run([make_config(f"model_name_or_path={folder}", "max_steps=1")])
    assert len(captured.session.model.module.get_base_model().model.layers) == 2


def test_train_file_path(make_config, captured, corpus: Path) -> None:
    run([make_config(f"train_file_path={corpus}", "train_file_name=mine.csv", "max_steps=1")])
    assert {r.origin.rsplit(":", 1)[0] for r in captured.session.rows} == {str(corpus / "mine.csv")}


def test_train_file_name(make_config, captured, corpus: Path) -> None:
    (corpus / "csv").mkdir()
    (corpus / "mine.csv").rename(corpus / "csv" / "第一 批(1).csv")
    run([make_config(f"train_file_path={corpus}", "train_file_name=第一 批(1).csv", "max_steps=1", "eval_ratio=0")])
    assert next(r.origin for r in captured.session.rows) == f"{corpus / 'csv' / '第一 批(1).csv'}:2"
    assert len(captured.session.rows) == 10


def test_template_name(make_config, captured) -> None:
    config = make_config("template_name=qwen2", "max_steps=1")
    run([config])
    text = captured.session.template.tokenizer.decode(captured.session.rows[0].ids_T)
    assert text.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n")
    manifest = json.loads((Path(config.output_dir) / "manifest.json").read_text(encoding="utf-8"))
    stated = "sftx's qwen2, by template_name=qwen2; not the model's own"
    assert manifest["effective"]["settings"]["chat_template"] == stated
    assert f"template  {stated}" in (Path(config.output_dir) / "train.log").read_text(encoding="utf-8")


@pytest.mark.parametrize("mode", ["qlora", "full"])
def test_train_mode(make_config, captured, mode: str) -> None:
    run([make_config(f"train_mode={mode}", "max_steps=1")])
    from bitsandbytes.nn import Linear4bit

    quantized = any(isinstance(m, Linear4bit) for m in captured.session.model.module.modules())
    assert quantized == (mode == "qlora")
    assert captured.trial.adapter.is_lora == (mode == "qlora")


def test_num_train_epochs(make_config, captured) -> None:
    run(
        [
            make_config(
                "num_train_epochs=3", "max_steps=null", "max_train_rows=16", "eval_ratio=0", "max_seq_length=1024"
            )
        ]
    )
    assert captured.trial.step == 12
    seen = [i for step in range(12) for i in captured.trial.feed.plan.rows(step)]
    assert sorted(seen) == sorted(list(range(16)) * 3)
    assert seen[:16] != seen[16:32], "each pass has an order of its own"


def test_per_device_train_batch_size(make_config, captured) -> None:
    run([make_config("per_device_train_batch_size=3", "gradient_accumulation_steps=2", "max_steps=1")])
    assert [len(m) for m in captured.trial.feed.plan.micro_batches(0, captured.trial.micro_batch)] == [3, 3]


def test_gradient_accumulation_steps(make_config, monkeypatch: pytest.MonkeyPatch) -> None:
    from sftx.parallel.stepper import Stepper

    calls = []
    backward = Stepper.backward
    monkeypatch.setattr(
        Stepper, "backward", lambda self, loss, last: (calls.append(last), backward(self, loss, last=last))
    )
    run([make_config("gradient_accumulation_steps=5", "max_steps=2")])
    assert calls == [False, False, False, False, True] * 2


def test_learning_rate(make_config, captured) -> None:
    run([make_config("learning_rate=3e-5", "scheduler=constant")])
    assert [g["lr"] for g in captured.trial.stepper.optimizer.param_groups] == [3e-5]


def test_max_seq_length(make_config, captured) -> None:
    run([make_config("max_seq_length=64", "max_steps=1")])
    lengths = [len(r.ids_T) for r in captured.session.rows]
    assert max(lengths) == 64
    assert any(r.full_length > 64 for r in captured.session.rows)


def test_logging_steps(make_config) -> None:
    config = make_config("logging_steps=3", "max_steps=7", "eval_ratio=0")
    run([config])
    assert [r["step"] for r in records(config)] == [1, 3, 6, 7]  # the first, every third, the last


def test_save_steps(make_config) -> None:
    config = make_config("save_steps=2", "save_strategy=steps", "save_total_limit=null", "max_steps=5")
    run([config])
    found = sorted(p.name for p in (Path(config.output_dir) / "checkpoints").iterdir())
    assert found == ["step-000002", "step-000004", "step-000005"]


@pytest.mark.parametrize(("strategy", "expected"), [("epoch", ["step-000004", "step-000008"]), ("no", [])])
def test_save_strategy(make_config, strategy: str, expected: list[str]) -> None:
    config = make_config(
        f"save_strategy={strategy}",
        "save_steps=1",
        "max_steps=8",
        "max_train_rows=16",
        "eval_ratio=0",
        "save_total_limit=9",
    )
    run([config])
    assert sorted(p.name for p in Path(config.output_dir).glob("checkpoints/*")) == expected


def test_save_total_limit(make_config) -> None:
    config = make_config("save_total_limit=2", "save_steps=1", "save_strategy=steps", "max_steps=4")
    run([config])
    found = sorted(p.name for p in (Path(config.output_dir) / "checkpoints").iterdir())
    assert found == ["step-000003", "step-000004"]


def test_lr_scheduler_type(make_config) -> None:
    config = make_config("lr_scheduler_type=linear", "max_steps=4", "learning_rate=1e-3")
    run([config])
    rates = [r["train/learning_rate"] for r in records(config) if "train/loss" in r]
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


def test_warmup_steps(make_config) -> None:
    config = make_config("warmup_steps=4", "max_steps=5", "learning_rate=1e-3")
    run([config])
    rates = [r["train/learning_rate"] for r in records(config) if "train/loss" in r]
    assert rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3])
    share = make_config("warmup_steps=0.5", "max_steps=4", "learning_rate=1e-3", output="share")
    run([share])
    rates = [r["train/learning_rate"] for r in records(share) if "train/loss" in r]
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3])


def test_lora_rank(make_config, captured) -> None:
    run([make_config("lora_rank=5", "max_steps=1")])
    assert {min(p.shape) for p in captured.trial.adapter.parameters.values()} == {5}


def test_lora_alpha(make_config, captured) -> None:
    from sftx.model.adapt import lora_layers

    run([make_config("lora_alpha=24", "lora_rank=8", "max_steps=1")])
    assert {layer.scaling["default"] for layer in lora_layers(captured.session.model.module)} == {3.0}


def test_lora_dropout(make_config, captured) -> None:
    from sftx.model.adapt import lora_layers

    run([make_config("lora_dropout=0.4", "max_steps=1")])
    layer = lora_layers(captured.session.model.module)[0]
    dropped = layer.lora_dropout["default"](torch.ones(100, 100))
    assert (dropped == 0).float().mean().item() == pytest.approx(0.4, abs=0.03)
    assert dropped.max().item() == pytest.approx(1 / 0.6, rel=1e-4)


@pytest.mark.parametrize(("asked", "again"), [("true", 4), ("false", 0), ("selective", 2), ("offload", 4)])
def test_gradient_checkpointing(make_config, captured, monkeypatch: pytest.MonkeyPatch, asked: str, again: int) -> None:
    """With it the forward pass of a block, of which there are four, is made once more in the backward pass."""
    from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

    calls = []
    forward = Qwen2MLP.forward
    monkeypatch.setattr(Qwen2MLP, "forward", lambda self, x: (calls.append(self.training), forward(self, x))[1])
    run(
        [make_config(f"gradient_checkpointing={asked}", "max_steps=1", "gradient_accumulation_steps=1", "eval_ratio=0")]
    )
    assert sum(calls) == 4 + again
    fallbacks = [f for f in captured.trial.effective.facts()["fallbacks"] if f["key"] == "gradient_checkpointing"]
    assert len(fallbacks) == (asked == "offload" and not torch.cuda.is_available())


@pytest.mark.parametrize("off", [True, False])
def test_disable_tqdm(
    make_config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], off: bool
) -> None:
    import sys

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run([make_config(f"disable_tqdm={off}", "max_steps=2")])
    assert ("2/2" in capsys.readouterr().err) == (not off)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("adamw_torch", torch.optim.AdamW), ("adafactor", torch.optim.Adafactor), ("sgd", torch.optim.SGD)],
)
def test_optim(make_config, captured, name: str, kind: type) -> None:
    run([make_config(f"optim={name}", "max_steps=1")])
    assert type(captured.trial.stepper.optimizer) is kind


def test_seed(make_config, captured) -> None:
    """The seed draws the adapter and the order of the rows, and not which rows are held out."""
    run([make_config("seed=7", "max_steps=1", output="a")])
    seven = (
        {n: p.detach().clone() for n, p in captured.trial.adapter.parameters.items()},
        captured.trial.feed.plan.rows(0),
    )
    held = [r.origin for r in captured.session.eval_rows]
    run([make_config("seed=8", "max_steps=1", output="b")])
    eight = (captured.trial.adapter.parameters, captured.trial.feed.plan.rows(0))
    name = next(n for n in seven[0] if "lora_A" in n)
    assert not torch.equal(seven[0][name], eight[0][name])
    assert seven[1] != eight[1]
    assert held == [r.origin for r in captured.session.eval_rows]


def test_fp16(make_config, captured) -> None:
    """On a CPU fp16 falls back to fp32 and says so; fp16=false asks for fp32, so there is nothing to say."""
    if torch.cuda.is_available():
        pytest.skip("tests/gpu looks at fp16 on a GPU")
    for value, said in (("true", True), ("false", False)):
        config = make_config(f"fp16={value}", "max_steps=1", output=value)
        run([config])
        assert captured.session.numerics.dtype == torch.float32
        fallbacks = json.loads((Path(config.output_dir) / "manifest.json").read_text())["effective"]["fallbacks"]
        assert ("fp16" in [f["key"] for f in fallbacks]) == said
        assert ("fp16=true -> fp32" in (Path(config.output_dir) / "train.log").read_text()) == said


def test_report_to(make_config) -> None:
    config = make_config("report_to=tensorboard", "max_steps=1")
    run([config])
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(Path(config.output_dir) / "tensorboard"))
    events.Reload()
    assert events.Scalars("train/loss")[0].value == pytest.approx(records(config)[1]["train/loss"], rel=1e-6)


def test_dataloader_num_workers(make_config, captured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The batches are made in other processes, and are the same."""
    import os

    import sftx.data.batches.feed as feed

    made = tmp_path / "pids"
    collate = feed.collate

    def spy(*args, **kwargs):
        with made.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return collate(*args, **kwargs)

    monkeypatch.setattr(feed, "collate", spy)
    config = make_config("dataloader_num_workers=2", "eval_ratio=0")
    run([config])
    pids = set(made.read_text().split())
    assert len(pids) == 2
    assert str(os.getpid()) not in pids
    alone = make_config("dataloader_num_workers=0", "eval_ratio=0", output="alone")
    run([alone])
    assert [r["train/loss"] for r in records(config)] == [r["train/loss"] for r in records(alone)]


def test_weight_decay(make_config, captured) -> None:
    """Decay pulls matrices towards zero: with a vanishing gradient step, by rate x decay."""
    run([make_config("mode=full", "weight_decay=0.5", "learning_rate=1e-3", "scheduler=constant", "max_steps=1", "optim=sgd", "max_grad_norm=1e-12")])  # fmt: skip
    from transformers import AutoModelForCausalLM

    before = dict(AutoModelForCausalLM.from_pretrained(captured.session.base_folder).named_parameters())
    after = captured.trial.adapter.parameters
    matrix, vector = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
    torch.testing.assert_close(after[matrix].detach(), before[matrix] * (1 - 1e-3 * 0.5))
    torch.testing.assert_close(after[vector].detach(), before[vector])


def test_max_grad_norm(make_config, captured) -> None:
    """With plain SGD the first update is the clipped gradient times the rate."""
    config = make_config("mode=full", "max_grad_norm=0.01", "optim=sgd", "optimizer.momentum=0", "learning_rate=1.0", "scheduler=constant", "max_steps=1")  # fmt: skip
    run([config])
    from transformers import AutoModelForCausalLM

    before = dict(AutoModelForCausalLM.from_pretrained(captured.session.base_folder).named_parameters())
    moved = (
        sum((p.detach() - before[n]).square().sum() for n, p in captured.trial.adapter.parameters.items()).sqrt().item()
    )
    assert records(config)[1]["train/grad_norm"] > 0.1
    assert moved == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("drop", [True, False])
def test_remove_unused_columns(make_config, corpus: Path, drop: bool) -> None:
    config = make_config(
        f"remove_unused_columns={drop}", f"train_file_path={corpus}", "train_file_name=mine.csv", "max_steps=1"
    )
    run([config])
    data = json.loads((Path(config.output_dir) / "manifest.json").read_text())["data"][0]
    row = json.loads(pa.ipc.open_file(Path(data["records"]).read_bytes()).read_all()["record"][3].as_py())
    assert set(row.get("extra", {})) == (set() if drop else {"note"})
    assert row["messages"][0] == {"role": "user", "content": "question 3?"}
    losses = [k for r in records(config) for k in r if k.startswith("eval/loss/")]
    assert losses, "category is kept for the metrics"


def test_every_run_leaves_no_handler_behind(make_config) -> None:
    run([make_config("max_steps=1")])
    assert not logging.getLogger("sftx").handlers


def test_the_readme_shows_the_tree_of_a_run_folder() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in (
        "config.yaml",
        "manifest.json",
        "metrics.jsonl",
        "train.log",
        "tensorboard/",
        "checkpoints/",
        "final/",
    ):
        assert name in text
