"""What must not be written down: the one place that knows a secret when it sees one.

Everything that sftx saves or sends (config.yaml, manifest.json, train.log, trial.json, trackers' settings)
goes through `scrub` first. Nothing is taken from memory: a component gets the value it asked for.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

HIDDEN = "***"
SECRET_NAME = re.compile(r"KEY|TOKEN(?!IZ)|SECRET|PASSWORD|PASSWD|CREDENTIAL|AUTH(?!OR)", re.IGNORECASE)
"""Environment variables whose values are secret; tokenizers and authors are not."""
SHORTEST = 6
"""A shorter value (`on`, `12345`) stands in too many innocent places to be looked for."""
KNOWN = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_-]{16,}|\bgh[pousr]_[A-Za-z0-9]{16,}|\bgithub_pat_\w{16,}"
    r"|\bAKIA[0-9A-Z]{16}\b|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)
"""Tokens of Hugging Face, OpenAI, GitHub and AWS, and name:password in an address, whatever they stand in."""
HEX40 = re.compile(r"[0-9a-f]{40}")
"""A Weights & Biases key; a git commit looks the same, so a key that names one is asked for its name."""
COMMIT = re.compile(r"commit|revision|sha|hash|digest|fingerprint", re.IGNORECASE)
TYPED = re.compile(r"(?P<name>[\w.]+)(?P<sign>=[\"']?)(?P<value>[0-9a-f]{40})(?![\w/])")
"""A key in a command, as in `tracker.wandb.name=0123...`."""


def scrub(value: Any) -> Any:
    """Return plain data with every secret in it replaced, in keys as well."""
    return _scrub(value, known_secrets(), "")


def known_secrets() -> list[str]:
    """Return the values of the environment's secrets, the longest first; a path to a secret is none."""
    found = {v for k, v in os.environ.items() if SECRET_NAME.search(k) and len(v) >= SHORTEST}
    return sorted((v for v in found if not (v.startswith("/") and Path(v).exists())), key=len, reverse=True)


def scrub_text(text: str) -> str:
    """Return a text without the secrets in it."""
    return _in_text(text, known_secrets())


def _scrub(value: Any, secrets: list[str], name: str) -> Any:
    if isinstance(value, str):
        if HEX40.fullmatch(value) and not COMMIT.search(name):
            return HIDDEN
        return _in_text(value, secrets)
    if isinstance(value, dict):
        return {_scrub(k, secrets, "key"): _scrub(v, secrets, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_scrub(v, secrets, name) for v in value]
    if isinstance(value, int | float) and not isinstance(value, bool) and str(value) in secrets:
        return HIDDEN
    return value


def _in_text(text: str, secrets: list[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return TYPED.sub(_typed, KNOWN.sub(HIDDEN, text))


def _typed(match: re.Match[str]) -> str:
    return match[0] if COMMIT.search(match["name"]) else f"{match['name']}{match['sign']}{HIDDEN}"
