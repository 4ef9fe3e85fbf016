"""What is secret stands in nothing that a run leaves behind."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sftx.config.checks.check import freeze
from sftx.config.composition.prepare import compose_checked, prepare
from sftx.logs import RunLog, ThirdPartyLog
from sftx.runs import trackers
from sftx.runs.trials import _scrub_record
from sftx.secrets import HIDDEN, known_secrets, scrub, scrub_text
from sftx.training.saving.run_folder import RunFolder

WANDB = "0123456789abcdef0123456789abcdef01234567"
SECRETS = {
    "WANDB_API_KEY": WANDB,
    "HF_TOKEN": "hf_AbCdEfGhIjKlMnOpQrStUvWxYz",
    "MY_SECRET": "open sesame",
    "DB_PASSWORD": "correct-horse",
    "LDAP_PASSWD": "battery/staple",
    "CLOUD_CREDENTIALS": '{"id": "xyzzy"}',
    "PROXY_AUTH": "user:pa55word",
    "API_KEY_NUMBER": "12345678",
}


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    return SECRETS


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_works_in_memory_and_is_not_saved(secrets: dict[str, str], tmp_path: Path, name: str) -> None:
    words = [
        "callback=[generate_samples]",
        "callback.generate_samples.prompts=['${oc.env:" + name + "}']",
        "data.columns={human: '${oc.env:" + name + "}'}",
        "data.system=say ${oc.env:" + name + "} aloud",
    ]
    config = freeze(compose_checked(words))
    assert config.callback["generate_samples"]["prompts"] == [secrets[name]]
    RunFolder(tmp_path / "run").open(
        config, {"command": f"python train.py {secrets[name]}", "environment": {"x": secrets[name]}}
    )
    for file in ("config.yaml", "manifest.json"):
        text = (tmp_path / "run" / file).read_text()
        assert HIDDEN in text
        plain = yaml.safe_load(text)
        assert secrets[name] not in str(plain), file
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["data"]["system"] == f"say {HIDDEN} aloud"


def test_a_run_with_a_secret_can_be_gone_on_with(secrets: dict[str, str], tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    identity = {"config": {"data": {"system": secrets["HF_TOKEN"]}}, "data": [], "model": "m", "adapter": None}
    folder.open(freeze(compose_checked([])), {"identity": identity})
    assert folder.earlier(identity) is not None


def test_a_secret_is_not_shown_resolved(secrets: dict[str, str]) -> None:
    words = ["data.system=${oc.env:MY_SECRET}", "--cfg", "job"]
    assert "${oc.env:MY_SECRET}" in (prepare(words).shown or "")
    shown = prepare([*words, "--resolve"]).shown or ""
    assert HIDDEN in shown
    assert "sesame" not in shown


@pytest.mark.parametrize(
    "text",
    [
        "hf_AbCdEfGhIjKlMnOpQr", "sk-proj-AbCdEfGhIjKlMnOp", "ghp_AbCdEfGhIjKlMnOpQr", "AKIAIOSFODNN7EXAMPLE",
        "github_pat_AbCdEfGhIjKlMnOp", f"wandb.key={WANDB}", "https://me:hunter2@host/",
    ],
)  # fmt: skip
def test_what_looks_like_a_token_is_hidden_wherever_it_came_from(text: str) -> None:
    found = scrub({"a": [f"before {text} after"], text: 1})
    assert text not in str(found)
    assert found["a"][0].startswith("before ")
    assert found["a"][0].endswith(" after")


def test_a_bare_key_is_hidden_and_a_commit_is_not() -> None:
    plain = {"name": WANDB, "git": {"commit": WANDB}, "tags": [WANDB], "model_revision": WANDB}
    assert scrub(plain) == {"name": HIDDEN, "git": {"commit": WANDB}, "tags": [HIDDEN], "model_revision": WANDB}
    path = f"/cache/models--x/snapshots/{WANDB}"
    assert scrub(f"model_name_or_path={path}") == f"model_name_or_path={path}"
    assert scrub(f"train.py revision={WANDB} x.key={WANDB}") == f"train.py revision={WANDB} x.key={HIDDEN}"


def test_a_number_that_is_a_secret_is_hidden(secrets: dict[str, str]) -> None:
    assert scrub({"x": 12345678, "y": 12345679, "z": True}) == {"x": HIDDEN, "y": 12345679, "z": True}


def test_innocent_variables_are_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    key_file = tmp_path / "key.json"
    key_file.write_text("{}")
    for name, value in {
        "TOKENIZERS_PARALLELISM": "disabled", "GIT_AUTHOR_NAME": "Adelaide", "XAUTHORITY": "/home/x/.Xauthority",
        "GOOGLE_APPLICATION_CREDENTIALS": str(key_file), "SHORT_KEY": "on", "LANGUAGE": "en_GB:en",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    assert not {"disabled", "Adelaide", str(key_file), "on", "en_GB:en", "/home/x/.Xauthority"} & set(known_secrets())


def test_a_default_config_is_saved_as_it_is() -> None:
    from dataclasses import asdict

    plain = json.loads(json.dumps(asdict(freeze(compose_checked(["callback=[generate_samples]", "tracker=wandb"])))))
    assert scrub(plain) == plain


@given(
    before=st.text(max_size=20), after=st.text(max_size=20), secret=st.text("abcdefgh0123-_", min_size=6, max_size=60)
)
def test_no_secret_survives_in_any_text(before: str, after: str, secret: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOME_TOKEN", secret)
        assert secret not in scrub_text(before + secret + after).replace(HIDDEN, "")


def test_the_log_holds_no_secret(secrets: dict[str, str], tmp_path: Path) -> None:
    log = RunLog(ThirdPartyLog(), is_main=True)
    try:
        log.to_file(tmp_path / "train.log", "default")
        logging.getLogger("sftx").info("fetching %s", secrets["HF_TOKEN"])
    finally:
        log.close()
    assert "fetching ***" in (tmp_path / "train.log").read_text()
    assert secrets["HF_TOKEN"] not in (tmp_path / "train.log").read_text()


def test_hydras_record_of_a_sweep_holds_no_secret(secrets: dict[str, str], tmp_path: Path) -> None:
    record = tmp_path / "multirun.yaml"
    record.write_text(f"hydra:\n  overrides:\n    task:\n    - data.system={secrets['HF_TOKEN']}\n    - seed=1\n")
    _scrub_record(record)
    assert yaml.safe_load(record.read_text())["hydra"]["overrides"]["task"] == ["data.system=***", "seed=1"]


def test_what_a_tracker_is_told_holds_no_secret(
    secrets: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import types

    told: dict[str, Any] = {}
    fake = types.SimpleNamespace(init=lambda **words: told.update(words), Settings=lambda **words: words)
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    secret = secrets["HF_TOKEN"]
    trackers.Wandb("p", None, f"run {secret}", [secret, "tag"]).start(tmp_path, {}, 0)
    assert told["name"] == f"run {HIDDEN}"
    assert told["tags"] == [HIDDEN, "tag"]


def test_weights_and_biases_keeps_no_secret_of_the_command_line(
    secrets: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    typed = [
        "train.py",
        f"data.system={secrets['MY_SECRET']}",
        "model_name_or_path=hf_TypedAndNowhereElse123",
        "seed=4",
    ]
    monkeypatch.setattr("sys.argv", typed)
    tracker = trackers.Wandb("p", None, None, []).start(tmp_path, {}, 0)
    assert sys.argv is typed
    tracker.log(1, {"x": 1.0})
    tracker.finish()
    deadline = time.monotonic() + 20
    while b"seed=4" not in (kept := _all_bytes(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.2)  # the client's own process writes
    assert b"seed=4" in kept, "the command line is stored"
    assert b"data.system=***" in kept
    for secret in (secrets["MY_SECRET"], "hf_TypedAndNowhereElse123"):
        assert secret.encode() not in kept


def _all_bytes(folder: Path) -> bytes:
    return b"".join(p.read_bytes() for p in folder.rglob("*") if p.is_file())
