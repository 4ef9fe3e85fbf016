"""Seeds that follow from what is drawn, not from what was drawn before."""

from __future__ import annotations

import hashlib
import struct


def key_of(*numbers: int) -> int:
    """Return a 63-bit seed that depends on each number and on their order."""
    packed = struct.pack(f"<{len(numbers)}q", *numbers)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1
