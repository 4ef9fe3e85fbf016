"""Loss curves on the CPU, as they were when written; a change of them is a change of what is learned.

To write them anew: SFTX_WRITE_GOLDEN=1 pytest tests/golden
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from sftx.run import run
from sftx.training.saving.metrics import read_metrics

FILE = Path(__file__).with_name("curves.json")
CASES = {
    "lora": ["mode=lora", "lora_dropout=0.05"],
    "qlora": ["mode=qlora", "lora_dropout=0.05"],
    "full": ["mode=full", "learning_rate=1e-3", "scheduler=cosine"],
}


@pytest.mark.parametrize("case", CASES)
def test_curve(make_config, case: str) -> None:
    config = make_config(*CASES[case], "max_steps=6", "per_device_train_batch_size=2", "max_grad_norm=0.3")
    run([config])
    records = read_metrics(Path(config.output_dir) / "metrics.jsonl")
    found = {k: [r[k] for r in records if k in r] for k in ("train/loss", "train/grad_norm", "eval/loss")}
    golden = json.loads(FILE.read_text()) if FILE.is_file() else {}
    if os.environ.get("SFTX_WRITE_GOLDEN"):
        golden[case] = found
        FILE.write_text(json.dumps(golden, indent=1) + "\n")
    for key, values in golden[case].items():
        assert found[key] == pytest.approx(values, rel=2e-4), key
