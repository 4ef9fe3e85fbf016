"""The error tree: whose fault it is decides the message and the exit code.

A `SftxError` is something the user can fix: one short message, no traceback, exit code 2.
Anything else is a fault of sftx or of the machine: traceback, exit code 1.
"""

from __future__ import annotations

import difflib
import os
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from sftx.terminal import visible_lines

EXIT_FAULT = 1
EXIT_USER = 2
EXIT_STOPPED = 75
"""The run was stopped by a signal and can be resumed: `EX_TEMPFAIL` of sysexits.h, on which a scheduler may requeue."""
EXIT_PIPE = 141
LISTED_FOLDERS = 8
"""Most folders that a message names."""


class SftxError(Exception):
    """A mistake the user can fix; its text names what was found, what was expected and what to do."""

    exit_code = EXIT_USER


class ConfigError(SftxError):
    """The configuration cannot be run; holds every problem found, not only the first."""

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


def raise_problems(problems: Iterable[str]) -> None:
    """Raise one ConfigError for all the problems, if there are any."""
    different = list(dict.fromkeys(problems))
    if different:
        raise ConfigError(different)


class DataError(SftxError):
    """A training or evaluation file cannot be read exactly."""


class ModelError(SftxError):
    """A model folder or hub id cannot be loaded or saved."""


class CheckpointError(SftxError):
    """A checkpoint is damaged, or belongs to another run."""


def other_format(found: object, read: int) -> str:
    """Return how the format of something stored differs from the one that this version reads."""
    if found is None:
        what = "it has no format number: an older version of sftx wrote it"
    elif isinstance(found, int):
        what = f"it has format {found}, of {'a newer' if found > read else 'an older'} version of sftx"
    else:
        what = f"it has the unknown format {found!r}"
    return f"{what}; this version reads format {read}"


class RunFolderError(SftxError):
    """The output folder cannot hold this run."""


class TrainingError(SftxError):
    """Training cannot continue (a loss that is not finite, a rank that failed)."""

    exit_code = EXIT_FAULT


class RankError(SftxError):
    """One of several processes ended the run; `printed` is what a run of one process would say of it."""

    def __init__(self, text: str, exit_code: int = EXIT_FAULT, printed: str = "") -> None:
        self.exit_code, self.printed = exit_code, printed
        super().__init__(text)


class StoppedError(SftxError):
    """A signal stopped the run."""

    exit_code = EXIT_STOPPED


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that looks most like `name`, or None when none is near."""
    lowered = {k.lower(): k for k in known}
    found = difflib.get_close_matches(name.lower(), list(lowered), n=1, cutoff=0.6)
    return lowered[found[0]] if found else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean X?`, or an empty string when nothing is near."""
    match = nearest(name, known)
    return f" Did you mean `{match}`?" if match else ""


def nearest_folder(name: str) -> str:
    """Return ` Did you mean X?` for a folder that does not exist, or the folders of its nearest parent, or nothing."""
    place, missing = Path(), list(Path(name).expanduser().parts)
    while missing and (place / missing[0]).is_dir():
        place /= missing.pop(0)
    for part in missing:
        below = _folders_in(place)
        near = part if part in below else nearest(part, below)
        if near is None:
            there = ", ".join(below[:LISTED_FOLDERS]) + (", ..." if len(below) > LISTED_FOLDERS else "")
            return f" The folders in {place}: {there}." if below and place != Path() else ""
        place /= near
    return f" Did you mean `{place}`?"


def _folders_in(place: Path) -> list[str]:
    try:
        return sorted(p.name for p in place.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError:
        return []


def put_place(error: Exception, places: Mapping[str, str]) -> None:
    """Put `file:line` before the text of a SftxError about `key=value`, where a file set that key."""
    place = places.get(str(error).partition("=")[0])
    if place is not None and isinstance(error, SftxError) and not isinstance(error, ConfigError):
        error.args = (f"{place}: {error}",)


def printed(error: BaseException) -> str:
    """Return what is printed of an error, as its kind demands, without control characters of the user's files."""
    return visible_lines(_printed(error))


def _printed(error: BaseException) -> str:
    if isinstance(error, ConfigError):
        count = len(error.problems)
        lines = [f"sftx: {count} problem{'s' if count > 1 else ''} in the configuration"]
        return "\n".join([*lines, *("  - " + problem.replace("\n", "\n    ") for problem in error.problems)])
    if isinstance(error, RankError) and error.printed:
        return f"{error.printed}\nsftx: {error}"
    if isinstance(error, SftxError):
        return f"sftx: {error}"
    return "".join(traceback.format_exception(error)).rstrip("\n")


def summary(error: BaseException) -> str:
    """Return an error in one line; a fault's begins with its kind."""
    text = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, SftxError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def say(error: BaseException) -> int:
    """Print an error and return the exit code; that all ranks were stopped is printed by the first one alone."""
    if not isinstance(error, StoppedError) or os.environ.get("RANK", "0") == "0":
        print(printed(error), file=sys.stderr)
    return error.exit_code if isinstance(error, SftxError) else EXIT_FAULT


@contextmanager
def reported() -> Iterator[None]:
    """Turn an error that leaves the block into its message and exit code."""
    try:
        yield
    except BrokenPipeError:  # `python train.py --help | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_PIPE)
    except KeyboardInterrupt:
        print("sftx: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:  # noqa: BLE001 - the one place where every error ends
        sys.exit(say(error))


OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED", "DefaultCPUAllocator", "not enough memory")
"""What CUDA, Triton, cuBLAS, cuDNN and torch's allocator on a CPU say, in plain RuntimeErrors."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an error says that memory does not suffice."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
