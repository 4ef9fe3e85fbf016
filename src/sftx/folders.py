"""Folders that do not exist: the nearest name."""

from __future__ import annotations

from pathlib import Path

from sftx.errors import nearest

LISTED = 8
"""Most folders that a message names."""


def nearest_folder(name: str) -> str:
    """Return ` Did you mean X?` for a folder that does not exist, or the folders of its nearest parent, or nothing."""
    place, missing = Path(), list(Path(name).expanduser().parts)
    while missing and (place / missing[0]).is_dir():
        place /= missing.pop(0)
    for part in missing:
        below = _folders(place)
        near = part if part in below else nearest(part, below)
        if near is None:
            there = ", ".join(below[:LISTED]) + (", ..." if len(below) > LISTED else "")
            return f" The folders in {place}: {there}." if below and place != Path() else ""
        place /= near
    return f" Did you mean `{place}`?"


def _folders(place: Path) -> list[str]:
    try:
        return sorted(p.name for p in place.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError:
        return []
