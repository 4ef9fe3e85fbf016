"""What a training step of Qwen2.5-7B's shape would launch, keep and wait for on a GPU, counted without one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is missing: the imitated GPU cannot be compiled"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="this build of torch has a CUDA device of its own"),
]

LAYERS, TRIED = 28, (3, 4, 5)
TODAY = {
    "qlora": {"calls": 11545, "calls_of_step": 417, "peak": 8_573_519_709},
    "lora": {"calls": 9781, "calls_of_step": 417, "peak": 18_216_268_877},
    "full": {"calls": 5726, "calls_of_step": 364, "peak": 121_864_554_344},
}
"""28 layers, 1,024 tokens, gradient checkpointing: aten calls but views, of a micro-batch and of the step; bytes."""
ALLOWED = 1.03
"""Times today's figure. A change that makes it smaller lowers TODAY, and benchmarks/results.md says so."""

Seen = dict[str, dict[int, dict[str, Any]]]


@pytest.fixture(scope="module")
def seen() -> Seen:
    """Return what was seen, by mode and number of layers."""
    cases = [{"mode": mode, "layers": layers} for mode in TODAY for layers in TRIED]
    command = [sys.executable, "-m", "tests.fake_gpu.simulate", *map(json.dumps, cases)]
    root = Path(__file__).resolve().parents[2]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    found: Seen = {}
    for line in map(json.loads, ended.stdout.splitlines()):
        found.setdefault(line["case"]["mode"], {})[line["case"]["layers"]] = line["seen"]
    return found


@pytest.mark.parametrize("mode", ["lora", "qlora"])
def test_adapted_layers_and_attention_compute_in_half_precision(seen: Seen, mode: str) -> None:
    """An fp32 input would be converted anew by each of the layers that share it."""
    for layers in TRIED:
        assert seen[mode][layers]["inputs"] == {"linear": ["torch.float16"], "attention": ["torch.float16"]}


@pytest.mark.parametrize("mode", TODAY)
def test_gradients_are_fp32(seen: Seen, mode: str) -> None:
    for layers in TRIED:
        assert seen[mode][layers]["gradients"] == ["torch.float32"]


@pytest.mark.parametrize("mode", TODAY)
def test_the_host_waits_for_nothing(seen: Seen, mode: str) -> None:
    """Neither a micro-batch nor the optimizer's step reads a value back, or copies to the GPU and waits."""
    for layers in TRIED:
        assert seen[mode][layers]["reads"] == []
        assert seen[mode][layers]["reads_of_step"] == []


@pytest.mark.parametrize("mode", TODAY)
def test_every_fast_path_is_taken(seen: Seen, mode: str) -> None:
    """sftx tries each on the device before the first step; None: no reason against it."""
    probed = {"varlen": None, "documents": None, "head": True}
    assert seen[mode][TRIED[-1]]["probed"] == probed


@pytest.mark.parametrize("figure", ["calls", "calls_of_step", "peak"])
@pytest.mark.parametrize("mode", TODAY)
def test_budget(seen: Seen, mode: str, figure: str) -> None:
    """Each layer adds the same (with fewer than three, the most memory is needed in the head)."""
    few, more, most = (seen[mode][layers][figure] for layers in TRIED)
    each = most - more
    assert more - few == pytest.approx(each, rel=1e-5)
    needed = most + (LAYERS - TRIED[-1]) * each
    assert needed <= TODAY[mode][figure] * ALLOWED
