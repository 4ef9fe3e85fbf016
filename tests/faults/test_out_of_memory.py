"""A micro-batch for which memory does not suffice is halved, and the step is the same; or its row is named."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import ROOT, over
from tests.invariance.test_invariance import CLIPS, assert_same_weights, curve, weights

from sftx.config.derive import first_micro_batch, largest_divisor
from sftx.errors import TrainingError, is_out_of_memory
from sftx.run import run
from sftx.training import loop
from sftx.training.loss import token_losses

SHARED = [
    "mode=lora", "lora_dropout=0", CLIPS, "learning_rate=1e-3", "gradient_accumulation_steps=8", "max_steps=4",
    "save_strategy=steps", "save_steps=2", "save_total_limit=null",
]  # fmt: skip
AUTO = "per_device_train_batch_size=auto"


def room_for(rows: int, monkeypatch: pytest.MonkeyPatch, from_call: int = 1) -> None:
    """Let the device have room for so many rows at once."""
    calls = itertools.count(1)

    def bounded(model: Any, batch: Any, device: Any) -> Any:
        if next(calls) >= from_call and len(batch.lengths) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return token_losses(model, batch, device)

    monkeypatch.setattr(loop, "token_losses", bounded)


@pytest.mark.parametrize("batching", ["padding_free", "padded", "length_bucketed", "packed"])
def test_the_micro_batch_is_halved_and_the_steps_are_the_same(
    make_config, monkeypatch: pytest.MonkeyPatch, captured, batching: str
) -> None:
    shared = [*SHARED, f"batching={batching}", "eval_ratio=0"]
    plain = make_config(*shared, "per_device_train_batch_size=1", output="plain")
    run([plain])
    room_for(2 if batching != "packed" else 8, monkeypatch, from_call=2)
    halved = make_config(*shared, AUTO, output="halved")
    run([halved])
    one, other = Path(plain.output_dir), Path(halved.output_dir)
    assert captured.trial.micro_batch < 8
    torch.testing.assert_close(torch.tensor(curve(one)), torch.tensor(curve(other)), rtol=2e-5, atol=0)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(tensor, weights(other)[name], rtol=0, atol=1e-4)
    log = (other / "train.log").read_text()
    assert "out of memory at a micro-batch of" in log
    assert "aspcoder_train.csv:" in log.partition("out of memory")[2]
    effective = json.loads((other / "manifest.json").read_text())["effective"]
    assert effective["settings"]["micro_batch"] == captured.trial.micro_batch
    assert any(f["requested"] == "auto" for f in effective["fallbacks"])


def test_a_resumed_run_begins_with_what_fitted(make_config, monkeypatch, captured, one_thread: None) -> None:
    """Bitwise: with dropout, whose masks are keyed by the micro-batch."""
    room_for(4, monkeypatch)
    words = over(SHARED, "lora_dropout=0.2", AUTO)
    straight = make_config(*words, output="straight")
    run([straight])
    for stop in ("max_steps=2", "max_steps=4"):
        run([make_config(*over(words, stop), output="resumed")])
    assert captured.trial.micro_batch == 4
    resumed = Path(straight.output_dir).parent / "resumed"
    assert curve(Path(straight.output_dir)) == curve(resumed)
    assert_same_weights(Path(straight.output_dir), resumed)
    assert (resumed / "train.log").read_text().count("out of memory at") == 1


def test_another_micro_batch_goes_on_with_the_same_steps(make_config, captured) -> None:
    """The order of the rows and the sequences of a step stay; a smaller device takes them in smaller portions."""
    words = [*SHARED, "eval_ratio=0"]
    straight = make_config(*words, "per_device_train_batch_size=1", output="straight")
    run([straight])
    parts = (
        ["max_steps=2", "per_device_train_batch_size=1"],
        ["per_device_train_batch_size=4", "gradient_accumulation_steps=2"],
    )
    for part in parts:
        run([make_config(*over(words, *part), output="resumed")])
    a, b = curve(Path(straight.output_dir)), curve(Path(straight.output_dir).parent / "resumed")
    torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=2e-5, atol=0)
    assert [len(m) for m in captured.trial.feed.plan.micro_batches(3, captured.trial.micro_batch)] == [4, 4]


@pytest.mark.parametrize(
    ("size", "rows", "says"),
    [
        ("8", 4, r"step 1: out of memory at a micro-batch of 8 rows, the longest of \d+ tokens \(.*csv:\d+\)\. Set per_device"),
        ("1", 0, r"step 1: out of memory at a row of \d+ tokens \(.*csv:\d+\)\. gradient_checkpointing=true"),
        ("auto", 0, r"step 1: out of memory at a row of \d+ tokens \(.*csv:\d+\)\. It is alone"),
    ],
)  # fmt: skip
def test_the_row_is_named_when_nothing_helps(make_config, monkeypatch, size: str, rows: int, says: str) -> None:
    room_for(rows, monkeypatch)
    with pytest.raises(TrainingError, match=says):
        run([make_config(*SHARED, f"per_device_train_batch_size={size}", "eval_ratio=0")])


def test_memory_that_is_out_elsewhere_is_a_short_message(make_config, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nMore.")

    monkeypatch.setattr("sftx.training.measure.evaluate.token_losses", refuse)
    with pytest.raises(TrainingError, match=r"^out of memory: CUDA out of memory. Tried to allocate 20 GiB. gradient_"):
        run([make_config(*SHARED)])


def test_the_first_micro_batch(make_config) -> None:
    typed = ["gradient_accumulation_steps=12", AUTO]
    assert first_micro_batch(make_config(*typed, "max_seq_length=1024"), measured=True) == 12
    assert first_micro_batch(make_config(*typed, "max_seq_length=1024"), measured=False) == 4
    assert first_micro_batch(make_config(*typed, "max_seq_length=99999"), measured=False) == 1
    assert [largest_divisor(12, n) for n in (12, 6, 5, 1, 0)] == [12, 6, 4, 1, 1]


def test_what_the_operating_system_refuses_is_known() -> None:
    """A real refusal: more address space is asked for than the process may have."""
    code = (
        "import resource, torch; resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))\n"
        "from sftx.errors import is_out_of_memory\n"
        "try: torch.empty(2**40)\n"
        "except RuntimeError as error: print(is_out_of_memory(error))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=os.environ)
    assert done.stdout.strip() == "True", done.stderr
    assert not is_out_of_memory(RuntimeError("size mismatch"))


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "Triton Error [CUDA]: out of memory",
    ],
)
def test_each_library_says_it_in_its_own_words(said: str) -> None:
    assert is_out_of_memory(RuntimeError(said))


def test_memory_that_is_out_while_the_model_is_tried_is_no_fault_of_the_model(make_config, monkeypatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")

    monkeypatch.setattr("sftx.model.probe.padding_free_inputs", refuse)
    with pytest.raises(TrainingError, match=r"^out of memory: CUDA out of memory"):
        run([make_config(*SHARED)])
