"""The settings in force, and how they differ from the requested ones: each fallback is printed once and stored."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Fallback:
    """A setting that this machine cannot honour, what is done instead, and why."""

    key: str
    requested: str
    effective: str
    reason: str

    def __str__(self) -> str:
        return f"{self.key}={self.requested} -> {self.effective}: {self.reason}"


@dataclass
class Effective:
    """The settings in force, the fallbacks, and remarks that a user should read before the first step."""

    settings: dict[str, Any] = field(default_factory=dict)
    fallbacks: list[Fallback] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def copy(self) -> Effective:
        """Return a copy to which one trial adds what is its own."""
        return Effective(dict(self.settings), list(self.fallbacks), list(self.remarks))

    def fall_back(self, key: str, requested: object, effective: str, reason: str) -> None:
        """Record a fallback, once."""
        new = Fallback(
            key, str(requested).lower() if isinstance(requested, bool) else str(requested), effective, reason
        )
        if new not in self.fallbacks:
            self.fallbacks.append(new)

    def remark(self, text: str) -> None:
        """Record a remark, once."""
        if text not in self.remarks:
            self.remarks.append(text)

    def facts(self) -> dict[str, Any]:
        """Return what the manifest says."""
        return {
            "settings": self.settings,
            "fallbacks": [asdict(f) for f in self.fallbacks],
            "remarks": self.remarks,
        }
