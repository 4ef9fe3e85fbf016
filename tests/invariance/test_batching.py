"""Rows concatenated are learned from as if each were alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.invariance.test_invariance import CLIPS, curve

from sftx.data.batches.collate import collate
from sftx.data.encode.row import Row
from sftx.model.kernels import attention
from sftx.run import run
from sftx.training.saving.metrics import read_metrics


@pytest.mark.parametrize(
    "words",
    [
        ["mode=lora", "gradient_checkpointing=true"],
        ["mode=qlora"],
        ["mode=full"],
        ["mode=lora", "batching=length_bucketed"],
        ["mode=lora", "attn_implementation=eager"],
    ],
    ids=["lora, recomputed", "qlora", "full", "against buckets", "eager"],
)
def test_padding_free_equals_padded(make_config, words: list[str]) -> None:
    """Loss and gradient norm of every step, and the evaluation, to 1e-5."""
    shared = [
        *(w for w in words if "batching" not in w), "lora_dropout=0", CLIPS, "per_device_train_batch_size=4",
        "gradient_accumulation_steps=2", "optimizer=sgd", "learning_rate=1e-2", "max_train_rows=32",
    ]  # fmt: skip
    if any("batching" in w for w in words):  # the order differs: the first step of one that holds all rows is the same
        shared += ["max_steps=1", "gradient_accumulation_steps=8"]
        shared.remove("gradient_accumulation_steps=2")
    padded = make_config(*shared, next((w for w in words if "batching" in w), "batching=padded"), output="padded")
    free = make_config(*shared, "batching=padding_free", output="free")
    for config in (padded, free):
        run([config])
    a, b = Path(padded.output_dir), Path(free.output_dir)
    torch.testing.assert_close(torch.tensor(curve(a)), torch.tensor(curve(b)), rtol=1e-5, atol=0)
    losses = [[r["eval/loss"] for r in read_metrics(f / "metrics.jsonl") if "eval/loss" in r] for f in (a, b)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_pack_is_learned_from_as_its_rows_alone(make_config, captured) -> None:
    """The first step's loss and norm, computed again with plain transformers, a row at a time."""
    config = make_config(
        "mode=full", "batching=packed", "per_device_train_batch_size=2", "gradient_accumulation_steps=2",
        "learning_rate=1e-12", "max_steps=1", "max_grad_norm=0", "max_seq_length=512",
    )  # fmt: skip
    run([config])
    from transformers import AutoModelForCausalLM

    session, trial = captured.session, captured.trial
    assert any(len(m) > 2 for m in trial.feed.plan.micro_batches(0, trial.micro_batch)), "several rows in a pack"
    model = AutoModelForCausalLM.from_pretrained(session.base_folder, dtype=torch.float32)
    rows = [session.rows[i] for i in trial.feed.plan.rows(0)]
    weight = sum(r.loss_weight for r in rows)
    total = 0.0
    for row in rows:
        ids = torch.from_numpy(row.ids_T.astype("int64"))[None]
        logits = model(input_ids=ids).logits[0, :-1]
        learned = torch.from_numpy(row.supervised_T[1:])
        loss = torch.nn.functional.cross_entropy(logits[learned], ids[0, 1:][learned], reduction="sum") / weight
        loss.backward()
        total += loss.item()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()
    first = next(r for r in read_metrics(Path(config.output_dir) / "metrics.jsonl") if "train/loss" in r)
    assert first["train/loss"] == pytest.approx(total, rel=1e-5)
    assert first["train/grad_norm"] == pytest.approx(norm, rel=1e-4)


def logits_of(model, rows: list[Row]) -> torch.Tensor:
    batch = collate(rows, tuple(range(len(rows))), padding_free=True, pad_id=0)
    assert batch.positions_BT is not None
    with torch.no_grad():
        laid = attention.padding_free_inputs(batch.positions_BT, batch.lengths)
        return model(input_ids=batch.ids_BT, use_cache=False, **laid).logits[0]


def row_of(*ids: int) -> Row:
    import numpy as np

    return Row(np.array(ids, dtype=np.int32), np.ones(len(ids), dtype=np.float32), "c", "f:1", len(ids))


@pytest.mark.parametrize("implementation", attention.IMPLEMENTATIONS)
@pytest.mark.parametrize("window", [None, 4], ids=["whole", "sliding window"])
def test_a_document_does_not_see_its_neighbours(window: int | None, implementation: str) -> None:
    """Changing a row leaves its neighbours' logits bitwise unchanged, and they are those of the plain implementation."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, use_sliding_window=window is not None, sliding_window=window, max_window_layers=0,
        attn_implementation=attention.register(implementation),
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).eval()
    middle, other = row_of(*range(10, 22)), row_of(*range(30, 42))
    first, last = row_of(1, 2, 3), row_of(4, 5, 6, 7, 8, 9)
    with_middle, with_other = logits_of(model, [first, middle, last]), logits_of(model, [first, other, last])
    assert torch.equal(with_middle[:3], with_other[:3])
    assert torch.equal(with_middle[15:], with_other[15:])
    assert not torch.equal(with_middle[3:15], with_other[3:15])
    model.set_attn_implementation(implementation)
    alone = model(input_ids=torch.from_numpy(middle.ids_T.astype("int64"))[None], use_cache=False).logits[0]
    torch.testing.assert_close(with_middle[3:15], alone, rtol=1e-5, atol=1e-6)


def test_a_model_that_mixes_rows_is_padded_and_said(make_config, monkeypatch) -> None:
    """The proof at the start is a real one: an attention that ignores the lengths is found out."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def leaky(attend, module, q, k, v, mask, document_lengths=None, **kwargs):
        return sdpa_attention_forward(module, q, k, v, mask, **kwargs)

    monkeypatch.setattr(attention, "attention", leaky)
    config = make_config("max_steps=1")
    run([config])
    effective = json.loads((Path(config.output_dir) / "manifest.json").read_text())["effective"]
    assert any("padding_free" in str(f) and "cannot keep rows apart" in str(f) for f in effective["fallbacks"])
    from sftx.errors import ConfigError

    with pytest.raises(ConfigError, match=r"batching=packed.*cannot keep rows apart"):
        run([make_config("max_steps=1", "batching=packed", output="packed")])
    monkeypatch.undo()
    attention.register("sdpa")


def test_generation_is_as_with_plain_sdpa(make_config, captured) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = make_config("mode=full", "max_steps=1")
    run([config])
    final = Path(config.output_dir) / "final"
    plain = AutoModelForCausalLM.from_pretrained(final)
    ours = captured.session.model.module.eval()
    tokenizer = AutoTokenizer.from_pretrained(final, padding_side="left")
    inputs = tokenizer(["one", "a longer prompt of words"], return_tensors="pt", padding=True)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    assert torch.equal(ours.generate(**inputs, **settings), plain.generate(**inputs, **settings))


def test_two_runs_can_be_compared_by_their_batches(make_config) -> None:
    lines = []
    for output, workers in (("one", 0), ("two", 2)):
        config = make_config("callback=log_batches", f"dataloader_num_workers={workers}", output=output)
        run([config])
        lines.append((Path(config.output_dir) / "batches.jsonl").read_text())
    assert lines[0] == lines[1]
    assert len({json.loads(line)["sha256"] for line in lines[0].splitlines()}) == 12
