"""Operations are counted as torch counts them, and rates are of what was really done."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sftx.data.loader import Batch
from sftx.run import run
from sftx.runs.metrics import read_metrics
from sftx.training import loop
from sftx.training.perf import Window, _of_gpu

PRODUCTS = ("aten.mm", "aten.addmm")
IN_PLACE = {torch.ops.aten.addmm_: lambda into, left, right, **_: 2 * left[0] * left[1] * right[1]}
"""What torch's counter does not know; it is given shapes."""


@pytest.mark.parametrize(("mode", "batching"), [("full", "padding_free"), ("full", "padded"), ("lora", "padding_free")])
def test_products_are_counted_as_torch_counts_them(
    make_config, monkeypatch: pytest.MonkeyPatch, captured, mode: str, batching: str
) -> None:
    counted: list[int] = []
    made_of: list[list[Batch]] = []
    launch = loop._launch

    def count(session, trial, step):  # type: ignore[no-untyped-def]
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
            launched = launch(session, trial, step)
        made_of.append(step.batches)
        found = counter.get_flop_counts()["Global"]
        counted.append(sum(n for op, n in found.items() if str(op).startswith(PRODUCTS)))
        return launched

    monkeypatch.setattr("sftx.run.last_block_shortened", lambda *_: False)  # it makes fewer than are counted
    windows: list[Window] = []
    record = loop._record
    monkeypatch.setattr(loop, "_launch", count)
    monkeypatch.setattr(loop, "_record", lambda s, t: (windows.append(t.window), record(s, t)))
    config = make_config(f"mode={mode}", f"batching={batching}", "per_device_train_batch_size=4", "lora_dropout=0")
    run([config])
    work = captured.session.work
    assert len(counted) == 3
    for batches, window, found in zip(made_of, windows, counted, strict=True):
        lengths = [length for b in batches for length in b.lengths]
        without_attention = work.flops([1] * sum(lengths), sum(b.supervised_tokens for b in batches))
        assert window.flops == work.flops(lengths, sum(b.supervised_tokens for b in batches)) > without_attention
        if mode == "full" and batching == "padding_free":
            assert found == pytest.approx(without_attention, rel=2e-3)  # attention of one token is next to nothing
        elif mode == "lora":
            unused = 2 * sum(lengths) * 192 * (192 + 64 + 64)  # the first block's inputs need no gradient
            assert found == pytest.approx(without_attention - unused, rel=5e-3)
        else:  # the products of padding are no work
            assert found > 1.05 * without_attention


def test_metrics_of_a_run(make_config) -> None:
    config = make_config("batching=padded", "per_device_train_batch_size=4", "max_steps=2")
    run([config])
    first, second = (r for r in read_metrics(Path(config.output_dir) / "metrics.jsonl") if "train/loss" in r)
    for record in (first, second):
        assert 0 < record["perf/padding"] < 0.9
        assert 0 <= record["perf/data_wait"] < 0.5
        assert 0.2 < record["perf/peak_memory_gb"] < 20
        assert record["perf/tflops"] > 0
        assert record["perf/mfu"] > 0
        assert record["perf/supervised_tokens_per_second"] < record["perf/tokens_per_second"]


@pytest.mark.parametrize(
    ("name", "dtype", "rate"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989e12),
        ("NVIDIA H100 PCIe", torch.float16, 756e12),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312e12),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165e12),
        ("NVIDIA A100-SXM4-80GB", torch.float32, 312e12 / 16),
        ("Some GPU", torch.bfloat16, None),
    ],
)
def test_rates_of_gpus(name: str, dtype: torch.dtype, rate: float | None) -> None:
    assert _of_gpu(name, dtype) == rate
