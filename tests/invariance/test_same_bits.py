"""The same seed on the same machine gives the same bits: every metric but speed, and the weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sftx.run import run
from sftx.runs.saved.comparison import is_speed, judge
from sftx.runs.saved.saved_run import open_run


@pytest.fixture(params=[1, pytest.param(2, marks=pytest.mark.slow)], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def bits(folder: Path) -> list[str]:
    """Return the records as they are written, without what is measured in time."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [json.dumps({k: v for k, v in r.items() if not is_speed(k)}) for r in records]


@pytest.mark.parametrize(
    ("mode", "workers", "batching"),
    [("lora", 0, "padding_free"), ("lora", 2, "packed"), ("qlora", 2, "padding_free"), ("full", 0, "length_bucketed")],
)
def test_the_same_seed_comes_to_the_same_bits(
    make_config, threads: int, mode: str, workers: int, batching: str
) -> None:
    """With dropout, accumulation, recomputation and an evaluation in between; the generators stand elsewhere."""
    shared = [
        f"mode={mode}", f"dataloader_num_workers={workers}", f"batching={batching}", "lora_dropout=0.2",
        "per_device_train_batch_size=2", "gradient_accumulation_steps=2", "gradient_checkpointing=true", "eval_steps=2",
    ]  # fmt: skip
    folders = []
    for name in ("one", "two"):
        config = make_config(*shared, output=name)
        run([config])
        folders.append(Path(config.output_dir))
        torch.rand(7)  # what a process draws before a run is no part of it
    one, two = folders
    assert bits(one) == bits(two)
    assert len(bits(one)) == 6
    files = [sorted((f / "final").glob("*.safetensors")) for f in folders]
    assert [p.name for p in files[0]] == [p.name for p in files[1]] != []
    assert [p.read_bytes() for p in files[0]] == [p.read_bytes() for p in files[1]]
    verdict = judge(open_run(one), open_run(two))
    assert verdict.same
    assert verdict.compared_weights


def test_another_seed_comes_to_other_bits(make_config) -> None:
    """Guards the test above, and what tells bits apart."""
    folders = []
    for seed in (1, 2):
        config = make_config("lora_dropout=0.2", f"seed={seed}", output=str(seed))
        run([config])
        folders.append(Path(config.output_dir))
    assert bits(folders[0]) != bits(folders[1])
    verdict = judge(*map(open_run, folders))
    assert not verdict.same
    assert verdict.first is not None
    assert verdict.first.step == 1
    assert [d.key for d in verdict.weights] == ["final/adapter_model.safetensors"]
