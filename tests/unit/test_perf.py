"""Operations are counted as torch counts them, and rates are of what was really done."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.utils.flop_counter import FlopCounterMode

from sftx.data.batches.collate import Batch
from sftx.model.head import HEAD
from sftx.run import run
from sftx.training import loop
from sftx.training.measure.perf import Window, _of_gpu, peak_memory, reset_peak_memory
from sftx.training.measure.profile import PRODUCTS as LAYERS
from sftx.training.measure.profile import parts_of
from sftx.training.saving.metrics import read_metrics

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


HALF_RATES = {
    "NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H100 NVL": 835e12,
    "NVIDIA H800": 989e12, "NVIDIA H20": 148e12, "NVIDIA H20-3e": 148e12, "NVIDIA B200": 2250e12, "NVIDIA GB200": 2500e12,
    "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA A100 80GB PCIe": 312e12, "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A800-SXM4-80GB": 312e12, "NVIDIA GH200 480GB": 989e12, "Tesla V100S-PCIE-32GB": 130e12, "NVIDIA A40": 150e12, "NVIDIA A30": 165e12, "NVIDIA A10": 125e12, "NVIDIA A10G": 70e12,
    "NVIDIA L40S": 362e12, "NVIDIA L40": 181e12, "NVIDIA L4": 121e12, "Tesla V100-SXM2-32GB": 125e12, "Tesla T4": 65e12,
    "NVIDIA GeForce RTX 5090": 210e12, "NVIDIA GeForce RTX 4090": 165e12, "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA RTX A4000": None, "NVIDIA RTX A1000": None, "NVIDIA RTX A4000 Laptop GPU": None, "NVIDIA GB10": None,
    "NVIDIA A100X": None, "NVIDIA GeForce RTX 4090 D": None, "NVIDIA GeForce RTX 4090 Laptop GPU": None,
    "NVIDIA GeForce RTX 3090 Ti": None, "NVIDIA GeForce RTX 5090 D": None, "NVIDIA GeForce RTX 5090 Laptop GPU": None,
    "NVIDIA B300": None, "NVIDIA T400": None, "Some GPU": None,
}  # fmt: skip


@pytest.mark.parametrize(("name", "rate"), HALF_RATES.items())
def test_rates_of_gpus(name: str, rate: float | None) -> None:
    assert _of_gpu(name, torch.bfloat16) == rate


def test_a_gpus_rate_in_fp32() -> None:
    assert _of_gpu("NVIDIA A100-SXM4-80GB", torch.float32) == 312e12 / 16


def test_the_peak_of_memory_starts_anew_with_each_run() -> None:
    device, big = torch.device("cpu"), 300_000_000
    with mmap.mmap(-1, big) as memory:
        reset_peak_memory(device)
        memory.write(bytes(big))
    before = peak_memory(device)
    reset_peak_memory(device)
    assert peak_memory(device) < before - big / 2


def test_a_run_resets_the_peak_of_memory(make_config, monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[torch.device] = []
    monkeypatch.setattr("sftx.run.reset_peak_memory", devices.append)
    run([make_config("max_steps=1")])
    assert devices == [torch.device("cpu")]


def test_a_kernel_counts_once_in_a_profile_of_a_gpu() -> None:
    """As torch 2.13 reports 50 us each of a product and of the head: the operation, its kernel, the annotation's range."""

    def event(number: int, name: str, start: int, end: int, **how: Any) -> FunctionEvent:
        return FunctionEvent(number, name, 1, start, end, use_device="cuda", **how)

    step = event(1, "ProfilerStep#2", 0, 100, is_user_annotation=True)
    product = event(2, "aten::mm", 5, 20)
    head = event(3, HEAD, 30, 90, is_user_annotation=True)
    inner = event(4, "aten::mm", 35, 50)
    for operation, kernel in ((product, "gemm"), (inner, "gemm"), (head, HEAD), (step, "ProfilerStep#2")):
        operation.append_kernel(kernel, 0, 50)
    gpu = [("gemm", 200, 250), ("gemm", 250, 300)]
    on_gpu = [event(5 + i, *kernel, device_type=DeviceType.CUDA) for i, kernel in enumerate(gpu)]
    on_gpu.append(event(9, HEAD, 250, 300, device_type=DeviceType.CUDA, is_user_annotation=True))
    for parent, child in ((step, product), (step, head), (head, inner)):
        child.set_cpu_parent(parent)
        parent.append_cpu_child(child)
    assert parts_of([step, product, head, inner, *on_gpu]) == {LAYERS: 0.5, "head and loss": 0.5}
