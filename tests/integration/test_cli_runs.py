"""The real command line, in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.conftest import SMALL

QUICK = [o for o in SMALL if not o.startswith(("max_steps", "lora_rank", "learning_rate"))]


def test_the_main_command_leaves_a_folder_that_explains_itself(cli, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["mode=qlora", "lora_rank=32", "debug=fast_dev", f"output_dir={out}"]
    done = cli(*words, SFTX_TEST_TOKEN="very-secret-value")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("╭─ sftx "), "no other package's messages"
    assert {p.name for p in out.iterdir()} == {
        "config.yaml", "manifest.json", "metrics.jsonl", "train.log", "tensorboard", "checkpoints", "final", "README.md"
    }  # fmt: skip
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["status"] == "completed"
    assert manifest["command"] == "python train.py " + " ".join(words)
    assert manifest["environment"]["packages"]["torch"]
    assert manifest["data"][0]["rows"] >= 350
    assert {f["key"] for f in manifest["effective"]["fallbacks"]} == {"fp16", "optim"}
    assert manifest["command"] in (out / "README.md").read_text()
    assert "fp16=true -> fp32" in done.stdout
    assert f"{out}/final/" in done.stdout
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "train/loss" in r] == [1, 2]
    assert {"train/grad_norm", "train/learning_rate", "perf/tokens_per_second"} <= records[1].keys()
    assert any(k.startswith("eval/loss/") for k in records[0])


def test_a_multirun_ends_with_a_table_and_survives_a_failed_trial(cli, tmp_path: Path) -> None:
    """Trial 1 has a prompt longer than the sequence: every row is refused; the others go on."""
    sweep = tmp_path / "sweep"
    done = cli("-m", "max_seq_length=96,8", "lora_rank=4,8", f"hydra.sweep.dir={sweep}", *[o for o in QUICK if "max_seq" not in o], "max_steps=1")  # fmt: skip
    assert done.returncode == 2, done.stderr[-2000:]
    outcomes = [json.loads((sweep / str(i) / "trial.json").read_text()) for i in range(4)]
    assert [o["status"] for o in outcomes] == ["completed", "completed", "failed", "failed"]
    for i in (0, 1):
        assert (sweep / str(i) / "final" / "adapter_model.safetensors").is_file()
    assert "4 trials in" in done.stdout
    table = done.stdout[done.stdout.index("4 trials in") :]
    assert table.index("completed") < table.index("failed")
    assert "lora_rank=8" in table
    assert "Traceback" not in done.stderr


def test_wandb_works_offline(cli, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    out = tmp_path / "run"
    done = cli("report_to=[tensorboard,wandb]", f"output_dir={out}", *[o for o in QUICK if "report_to" not in o], "max_steps=2", WANDB_MODE="offline")  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert list((out / "wandb").glob("offline-run-*/run-*.wandb"))
    assert list((out / "tensorboard").glob("events*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [["mode=lora"], ["mode=qlora"], ["mode=full"], ["mode=qlora", "lora_rank=32"]], ids=" ".join
)
def test_the_defaults_run_to_the_end(cli, words: list[str], tmp_path: Path) -> None:
    """With no other argument (but where to put it), without a network."""
    done = cli(*words, f"output_dir={tmp_path / 'run'}", timeout=580)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "completed"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "encoding"),
    [("alpaca_zh_demo.csv", "utf-8"), ("alpaca_zh_200.gb18030.csv", "gb18030"), ("alpaca_zh_200.utf16.csv", "utf-16"),
     ("identity.csv", "utf-8"), ("questions_gen_postgres.csv", "utf-8"), ("self_instruct_seed.csv", "utf-8")],
)  # fmt: skip
def test_real_files_train(make_config, captured, shared_data: Path, name: str, encoding: str) -> None:
    from sftx.run import run

    config = make_config(f"train_file_path={shared_data}", f"train_file_name={name}", "max_train_rows=null", "max_seq_length=1024", "max_steps=2")  # fmt: skip
    result = run([config])[0]
    assert result.eval_loss is not None
    data = json.loads((Path(config.output_dir) / "manifest.json").read_text())["data"][0]
    assert data["encoding"].replace("_", "-").startswith(encoding)
