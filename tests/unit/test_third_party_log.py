"""What other packages log goes to train.log, and none of it to the terminal."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from sftx.logs import RunLog, ThirdPartyLog


def test_other_packages_write_to_the_log_file_only(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from sftx.model.loading.load import log_through_root

    log_through_root()
    with ThirdPartyLog() as third_party:
        write(RunLog(third_party, is_main=True), tmp_path / "train.log")
    written = (tmp_path / "train.log").read_text()
    for text in ("before the file is open", "of transformers", "of Python", "of sftx"):
        assert written.count(text) == 1, text
    assert "too fine" not in written
    shown = capfd.readouterr()
    assert shown.out + shown.err == "of sftx\n"
    logging.getLogger("other").warning("after the run")
    assert "after the run" not in (tmp_path / "train.log").read_text()


def test_hydra_verbose_adds_messages_for_debugging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Hydra itself: it lowers the level of the root logger, or of the loggers that are listed."""
    monkeypatch.setattr(HydraConfig, "initialized", lambda: True)
    monkeypatch.setattr(HydraConfig, "get", lambda: OmegaConf.create({"verbose": ["other"]}))
    monkeypatch.setattr(logging.getLogger("other"), "level", logging.DEBUG)
    with ThirdPartyLog() as third_party:
        write(RunLog(third_party, is_main=True), tmp_path / "train.log")
    assert "too fine" in (tmp_path / "train.log").read_text()


def write(log: RunLog, path: Path) -> None:
    from transformers.utils import logging as transformers_logging

    logging.getLogger("bitsandbytes.backends").warning("before the file is open")
    log.to_file(path, "default")
    transformers_logging.get_logger("transformers.modeling").warning("of transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning("of Python", UserWarning, "file.py", 1)
    logging.getLogger("other").info("too fine")
    log.logger.info("of sftx")
    log.close()
