"""Runs that must come to the same numbers: loss, gradient norm and weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import SMALL, TWO_RANKS, over

from sftx.run import run
from sftx.training.saving.metrics import read_metrics

CLIPS = "max_grad_norm=0.05"  # far below the norms that occur: a gradient wrong by a factor would show


def curve(folder: Path) -> list[tuple[float, float]]:
    """Return (loss, gradient norm) of each recorded step."""
    return [
        (r["train/loss"], r["train/grad_norm"]) for r in read_metrics(folder / "metrics.jsonl") if "train/loss" in r
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    final = folder / "final"
    name = "adapter_model.safetensors" if (final / "adapter_model.safetensors").is_file() else "model.safetensors"
    return load_file(final / name)


def assert_same_weights(one: Path, other: Path) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_accumulation_does_not_change_the_step(make_config, mode: str) -> None:
    """8 micro-batches of 1 row and 1 micro-batch of 8 rows are the same optimizer step."""
    shared = [f"mode={mode}", "lora_dropout=0", CLIPS, "learning_rate=1e-3"]
    one = make_config(*shared, "per_device_train_batch_size=1", "gradient_accumulation_steps=8", output="a")
    eight = make_config(*shared, "per_device_train_batch_size=8", "gradient_accumulation_steps=1", output="b")
    run([one])
    run([eight])
    a, b = curve(Path(one.output_dir)), curve(Path(eight.output_dir))
    assert len(a) == 3
    torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=2e-5, atol=0)
    for name, tensor in weights(Path(one.output_dir)).items():
        torch.testing.assert_close(tensor, weights(Path(eight.output_dir))[name], rtol=0, atol=1e-4)


def test_the_loss_is_the_mean_over_the_tokens_of_the_step(make_config, captured) -> None:
    """Against a reference that runs each row alone through plain transformers and averages over all tokens."""
    config = make_config("mode=lora", "lora_dropout=0", "max_steps=1", "per_device_train_batch_size=2")
    run([config])
    session, trial = captured.session, captured.trial
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(session.base_folder)
    total, tokens = 0.0, 0
    for i in trial.feed.plan.rows(0):
        row = session.rows[i]
        ids = torch.from_numpy(row.ids_T.astype("int64"))[None]
        labels = torch.where(torch.tensor(row.supervised_T)[None], ids, -100)
        count = int((labels[:, 1:] != -100).sum())
        total += base(input_ids=ids, labels=labels).loss.item() * count
        tokens += count
    assert curve(Path(config.output_dir))[0][0] == pytest.approx(total / tokens, rel=1e-5)


@pytest.mark.parametrize("mode", ["lora", "qlora"])
def test_checkpointing_changes_nothing_even_with_dropout(make_config, mode: str, one_thread: None) -> None:
    """Recomputation draws the same dropout masks, because they are keyed and not drawn in order."""
    off = make_config(f"mode={mode}", "lora_dropout=0.3", "gradient_checkpointing=false", output="off")
    on = make_config(f"mode={mode}", "lora_dropout=0.3", "gradient_checkpointing=true", output="on")
    run([off])
    run([on])
    assert curve(Path(off.output_dir)) == curve(Path(on.output_dir))
    assert_same_weights(Path(off.output_dir), Path(on.output_dir))


def test_dropout_is_alive_and_follows_the_seed(make_config) -> None:
    """Guards the test above: with dropout off or another seed the numbers do differ."""
    plain = make_config("lora_dropout=0", output="plain")
    dropped = make_config("lora_dropout=0.3", output="dropped")
    other = make_config("lora_dropout=0.3", "seed=43", output="other")
    for config in (plain, dropped, other):
        run([config])
    curves = [curve(Path(c.output_dir)) for c in (plain, dropped, other)]
    assert curves[0][0][1] != curves[1][0][1]  # B is zero at first: the loss is equal, its gradient is not
    assert curves[1] != curves[2]


def test_two_adapters_in_one_call_each_equal_their_own_run(make_config, one_thread: None) -> None:
    """Other rank, rate, seed, schedule, dropout and length: trained together on one base, or alone."""
    first = ["lora_rank=8", "learning_rate=1e-3", "seed=1", "lora_dropout=0.2"]
    second = ["lora_rank=4", "learning_rate=3e-3", "seed=2", "lora_dropout=0.1", "scheduler=cosine", "max_steps=5"]
    together = [make_config(*first, output="t1"), make_config(*second, output="t2")]
    alone = [make_config(*first, output="a1"), make_config(*second, output="a2")]
    run(together)
    for config in alone:
        run([config])
    for t, a in zip(together, alone, strict=True):
        assert curve(Path(t.output_dir)) == curve(Path(a.output_dir))
        assert_same_weights(Path(t.output_dir), Path(a.output_dir))
        settings = [json.loads((Path(c.output_dir) / "manifest.json").read_text())["effective"] for c in (t, a)]
        assert settings[0] == settings[1], "each manifest tells of its own trial"
        evals = [
            [r["eval/loss"] for r in read_metrics(Path(c.output_dir) / "metrics.jsonl") if "eval/loss" in r]
            for c in (t, a)
        ]
        assert evals[0] == evals[1]
        logs = [(Path(c.output_dir) / "train.log").read_text() for c in (t, a)]
        assert len({log.count(" step ") for log in logs}) == 1, "each log holds its own trial's messages"


@pytest.mark.parametrize(
    ("mode", "workers", "optimizer"),
    [("lora", 0, "paged_adamw_32bit"), ("lora", 2, "adamw_8bit"), ("qlora", 0, "lion"), ("full", 0, "adafactor")],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    make_config, mode: str, workers: int, optimizer: str, one_thread: None
) -> None:
    """Stopped in the first epoch and in the second, with dropout, accumulation and evaluation in between."""
    shared = [
        f"mode={mode}", f"dataloader_num_workers={workers}", f"optimizer={optimizer}", "lora_dropout=0.2", "save_steps=2",
        "save_strategy=steps", "eval_steps=3", "max_train_rows=24", "scheduler=reduce_lr_on_plateau", "learning_rate=1e-3",
    ]  # fmt: skip
    straight = make_config(*shared, "max_steps=9", output="straight")
    run([straight])
    for stop in ("max_steps=4", "max_steps=7", "max_steps=9"):
        run([make_config(*shared, stop, output="resumed")])
    resumed = Path(straight.output_dir).parent / "resumed"
    assert curve(Path(straight.output_dir)) == curve(resumed)
    assert_same_weights(Path(straight.output_dir), resumed)
    steps = [r["step"] for r in read_metrics(resumed / "metrics.jsonl") if "train/loss" in r]
    assert steps == list(range(1, 10))
    attempts = json.loads((resumed / "manifest.json").read_text())["attempts"]
    assert [a["from_step"] for a in attempts] == [0, 4, 7]


@pytest.mark.parametrize("mode", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_two_ranks_equal_one_process(make_config, cli, tmp_path: Path, mode: str) -> None:
    """torchrun with gloo: the loss and gradient norm of every step, and the evaluation, are those of one process."""
    shared = [f"mode={mode}", "lora_dropout=0.1", CLIPS, "learning_rate=1e-3", "max_train_rows=30"]
    alone = make_config(*shared, "gradient_accumulation_steps=4", output="alone")
    run([alone])
    ranked = over(SMALL, *shared, "parallel=ddp", "gradient_accumulation_steps=2", f"output_dir={tmp_path / 'ddp'}")
    done = cli(*ranked, launcher=TWO_RANKS)
    assert done.returncode == 0, done.stderr[-3000:]
    a, b = Path(alone.output_dir), tmp_path / "ddp"
    torch.testing.assert_close(torch.tensor(curve(a)), torch.tensor(curve(b)), rtol=2e-5, atol=0)
    losses = [[r["eval/loss"] for r in read_metrics(f / "metrics.jsonl") if "eval/loss" in r] for f in (a, b)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, tensor in weights(a).items():
        torch.testing.assert_close(tensor, weights(b)[name], rtol=0, atol=2e-5)
