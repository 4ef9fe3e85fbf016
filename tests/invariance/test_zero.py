"""ZeRO-3 under torchrun trains as one process does, and its checkpoints are anyone's."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import ROOT, SMALL, TWO_RANKS, over
from tests.invariance.test_invariance import CLIPS, curve, weights

from sftx.config.composition.prepare import prepare
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


def changed(what: str, folder: Path, *words: str, ranks: int) -> subprocess.CompletedProcess[str]:
    """Train in processes of their own with one thing changed: see changed_rank.py."""
    launcher, parallel = (TWO_RANKS, "zero3") if ranks == 2 else ((sys.executable,), "single")
    accumulation = f"gradient_accumulation_steps={8 // ranks}"
    settings = over(SMALL, *words, accumulation, f"parallel={parallel}", f"output_dir={folder}", "lora_dropout=0")
    command = [*launcher, str(Path(__file__).with_name("changed_rank.py")), what, *settings]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])  # of train.py
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def saved(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step-{step:06d}" / "adapter_model.safetensors")


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_zero3_in_bf16_with_checkpointing(tmp_path: Path, mode: str) -> None:
    """Recomputation gathers each layer's parameters again; the fp32 copies learn what fp32 weights would."""
    one, two = tmp_path / "one", tmp_path / "two"
    words = [f"mode={mode}", "optimizer=adamw", "learning_rate=1e-3", "gradient_checkpointing=true", "precision=bf16"]
    for folder, ranks in ((one, 1), (two, 2)):
        done = changed("bf16", folder, *words, ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
    torch.testing.assert_close(torch.tensor(curve(one)), torch.tensor(curve(two)), rtol=2e-2, atol=0)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_spike_is_not_learned_from_under_zero3(tmp_path: Path) -> None:
    """Its gradients are gone before the next step, which is that of one process."""
    one, two = tmp_path / "one", tmp_path / "two"
    words = ["mode=lora", "optimizer=adamw", "on_loss_spike=skip", "max_steps=5", "eval_ratio=0"]
    words += ["save_strategy=steps", "save_steps=1", "save_total_limit=null"]
    for folder, ranks in ((one, 1), (two, 2)):
        done = changed("spike", folder, *words, ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
        before, skipped, after = (saved(folder, step) for step in (3, 4, 5))
        assert all(torch.equal(before[name], skipped[name]) for name in before)
        assert not all(torch.equal(skipped[name], after[name]) for name in before)
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, saved(one, 5)[name], rtol=0, atol=1e-4)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_signal_to_one_rank_of_zero3_discards_the_partial_step(tmp_path: Path, make_config) -> None:
    """All ranks end before the same micro-batch, and the checkpoint is that of the last complete step."""
    words = ["mode=lora", "optimizer=adamw", "eval_ratio=0", "save_strategy=steps", "save_steps=100", "lora_dropout=0"]
    done = changed("stop", tmp_path / "two", *words, ranks=2)
    assert done.returncode != 0
    assert "stopped after step 2 of 3" in done.stderr, done.stderr[-3000:]
    run([make_config(*words, "gradient_accumulation_steps=8", "max_steps=2", output="one")])
    for name, tensor in saved(tmp_path / "one", 2).items():
        torch.testing.assert_close(saved(tmp_path / "two", 2)[name], tensor, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optim=adafactor"], "expected adamw or sgd, got optim=adafactor"),
        (["mode=qlora"], "cannot split a 4-bit base"),
    ],
)
def test_what_cannot_be_split_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        prepare(["parallel=zero3", *words])


def test_zero3_brings_an_optimizer_that_it_can_split() -> None:
    from sftx.config.composition.prepare import compose_checked

    assert compose_checked(["parallel=zero3"]).optim == "adamw"


def test_without_deepspeed_it_is_said_what_to_install(make_config, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_SKIP_CUDA_CHECK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"pip install .*deepspeed"):
        run([make_config("parallel=zero3", "mode=full")])
