"""docs/components.md from its own text: each example is run; and what a class that is no component is answered."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from tests.conftest import ROOT, SMALL, over

from sftx.config.checks.check import freeze
from sftx.config.composition.prepare import compose_checked, prepare
from sftx.errors import ConfigError

PAGES = ["docs/components.md", "docs/components.zh-CN.md"]


def blocks(page: str, kind: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [body for name, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE) if name == kind]


@pytest.fixture
def here(tmp_path: Path, my_parts: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the page's files into a folder of the test's own, which is the working directory."""
    my_parts("\n".join(blocks(PAGES[0], "python")))
    for text in blocks(PAGES[0], "yaml"):
        path = tmp_path / text.splitlines()[0].removeprefix("# ")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def commands() -> list[list[str]]:
    return [shlex.split(text)[2:] for text in blocks(PAGES[0], "")]


def test_each_component_has_ten_lines_at_most_and_the_pages_agree() -> None:
    for kind in ("python", "yaml", ""):
        assert blocks(PAGES[0], kind) == blocks(PAGES[1], kind)
    parts = blocks(PAGES[0], "python")
    assert len(parts) == len(commands()) == 4
    assert all(len([line for line in part.splitlines()[1:] if line]) <= 10 for part in parts)


def trained(here: Path, number: int) -> tuple[Path, str]:
    small = [word for word in SMALL if not word.startswith("report_to")]
    words = [*over(small, "output_dir=run", f"train_file_path={ROOT / 'data'}", "eval_steps=1"), *commands()[number]]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *words], cwd=here, text=True, capture_output=True, timeout=120,
        env=os.environ | {"PYTHONPATH": f"{here}:{ROOT / 'src'}"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return here / "run", done.stdout + done.stderr


def test_the_optimizer_of_the_page(here: Path) -> None:
    run, _ = trained(here, 0)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["optim"], config["optimizer"]["weight_decay"]) == ("nadam", 0.01)


def test_the_schedule_of_the_page_is_shown_and_stored_by_its_own_name(here: Path) -> None:
    run, shown = trained(here, 1)
    assert re.search(r"lr +0.001, my_parts.Sawtooth", shown)
    assert "constant_with_warmup" not in shown
    assert yaml.safe_load((run / "config.yaml").read_text())["lr_scheduler_type"] == "my_parts.Sawtooth"
    assert json.loads((run / "manifest.json").read_text())["identity"]["config"]["lr_scheduler_type"] == (
        "my_parts.Sawtooth"
    )


def test_the_callback_of_the_page(here: Path) -> None:
    run, _ = trained(here, 2)
    result = json.loads((run / "manifest.json").read_text())["result"]
    assert result["steps"] < 3
    assert "is below 9" in result["stop_reason"]


def test_the_tracker_of_the_page(here: Path) -> None:
    run, _ = trained(here, 3)
    assert {line.split(",")[0] for line in (run / "table.csv").read_text().splitlines()} >= {"1", "2", "3"}
    assert list((run / "tensorboard").iterdir())


ALLOW = "allow_targets=[my_parts.*,torch.optim.*,json.*]"


def refused(*words: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        prepare([ALLOW, *words])
    return error.value.problems


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optimizer._target_=torch.optim.AdamW"], "`optimizer._target_=torch.optim.AdamW`: not a component of "
         "`optimizer`: it has no method `build`. To write one: define `build(parameters, learning_rate, effective)`"),
        (["scheduler._target_=sftx.training.optimizers.Sgd"], "derive from sftx.training.schedulers.Schedule"),
        (["scheduler._target_=json.dumps"], "not a component of `scheduler`: it has no method `at`"),
        (["callback=[log_batches]", "callback.log_batches._target_=my_parts.Table"], "it has no method `on_start`"),
        (["tracker.tensorboard._target_=my_parts.StopBelow"], "it has no method `start`"),
        (["mode._target_=my_parts.NAdam"], "derive from sftx.model.modes.Lora"),
    ],
)  # fmt: skip
def test_what_is_no_component_is_answered_with_what_one_must_be(here: Path, words: list[str], said: str) -> None:
    [found] = refused(*words)
    assert said in found
    assert found.endswith("(docs/components.md).")


def test_keys_of_the_replaced_option_are_named_with_how_to_take_them_out(here: Path) -> None:
    [found] = refused("optimizer._target_=my_parts.NAdam")
    assert (
        "`optimizer.bits`, `optimizer.paged`, `optimizer.betas`, `optimizer.eps` of optimizer=paged_adamw_32bit"
        in found
    )
    out = "~optimizer.bits ~optimizer.paged ~optimizer.betas ~optimizer.eps"
    assert f"Type {out}, or" in found
    config = freeze(compose_checked([ALLOW, "optimizer._target_=my_parts.NAdam", *out.split()]))
    assert config.optim == "my_parts.NAdam"
    [found] = refused("optimizer._target_=my_parts.NAdam", "optimizer.wieght_decay=1", *out.split())
    assert "Did you mean `weight_decay`?" in found


def test_each_trial_of_a_sweep_and_cfg_name_the_class(here: Path) -> None:
    assert "lr_scheduler_type: my_parts.Sawtooth\n" in (
        prepare(["--cfg", "job", ALLOW, "scheduler._target_=my_parts.Sawtooth"]).shown or ""
    )
    usual = freeze(compose_checked(["scheduler=cosine", "scheduler.floor=0.5"]))
    assert usual.lr_scheduler_type == "cosine"
