"""ZeRO-3 under torchrun trains as one process does, and its checkpoints are anyone's."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from tests.conftest import SMALL, TWO_RANKS
from tests.invariance.test_invariance import CLIPS, curve, weights

from sftx.config.compose import prepare
from sftx.errors import ConfigError
from sftx.run import run

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: make test-slow installs it"
)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_two_ranks_of_zero3_equal_one_process(make_config, cli, tmp_path: Path, mode: str) -> None:
    """Stopped twice, then ended by one process: losses, gradient norms and weights are those of one run.

    26 rows make steps of unequal size, and a last one in which a rank has no row.
    """
    shared = [
        f"mode={mode}", "optimizer=adamw", "lora_dropout=0.1", "weight_decay=0.1", CLIPS, "learning_rate=1e-4",
        "max_train_rows=30", "save_strategy=steps", "save_total_limit=null",
    ]  # fmt: skip
    alone = make_config(*shared, "gradient_accumulation_steps=4", "max_steps=9", output="alone")
    run([alone])
    typed = {o.split("=")[0] for o in shared} | {"gradient_accumulation_steps", "max_steps"}
    words = [*shared, *(o for o in SMALL if o.split("=")[0] not in typed), f"output_dir={tmp_path / 'zero'}"]
    for stop in ("max_steps=3", "max_steps=6"):
        done = cli(*words, "parallel=zero3", "gradient_accumulation_steps=2", stop, launcher=TWO_RANKS, timeout=400)
        assert done.returncode == 0, done.stderr[-3000:]
    run([make_config(*shared, "gradient_accumulation_steps=4", "max_steps=9", output="zero")])
    one, other = Path(alone.output_dir), tmp_path / "zero"
    torch.testing.assert_close(torch.tensor(curve(one)), torch.tensor(curve(other)), rtol=2e-4, atol=0)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(tensor, weights(other)[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optim=adafactor"], "found optim=adafactor, wanted adamw or sgd"),
        (["mode=qlora"], "cannot split a 4-bit base"),
    ],
)
def test_what_cannot_be_split_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        prepare(["parallel=zero3", *words])


def test_zero3_brings_an_optimizer_that_it_can_split() -> None:
    from sftx.config.compose import compose_checked

    assert compose_checked(["parallel=zero3"]).optim == "adamw"


def test_without_deepspeed_it_is_said_what_to_install(make_config, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_SKIP_CUDA_CHECK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"pip install .*deepspeed"):
        run([make_config("parallel=zero3", "mode=full")])
