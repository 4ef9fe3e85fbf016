"""Runs that are ended, or refused by the disk, at a chosen moment: forked from one process that has imported everything.

`Zygote` starts `python -m tests.faults.kill`, which forks a process for each run that is asked for. The forked
one watches its own system calls, in whichever thread they are made, so that a run can be killed before its k-th
write to the disk, or be told there that the disk is full. Nothing here knows how a checkpoint is made.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from tests.conftest import ROOT
from tests.faults.moment import Moments, fork_ranks

from sftx.files import TEMPORARY

PHASES = ("setup", "stepping", "ending", "evaluating", "saving", "rotating", "publishing final")
SAVE, FINAL, RUN = "save", "final", "run"
"""Where a write is: in checkpoints/, in final/, or elsewhere in the run folder."""
WARM = {
    "deepspeed",
    "accelerate",
    "bitsandbytes",
    "numpy",
    "peft",
    "pyarrow",
    "safetensors",
    "sftx",
    "tokenizers",
    "torch",
    "transformers",
}
SUBREAPER = 36
"""prctl's PR_SET_CHILD_SUBREAPER: orphans become children of who asks for it."""


class Zygote:
    """The other end of the process that forks runs."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.kill"], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
            text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def run(self, folder: Path, words: list[str], **how: Any) -> dict[str, Any]:
        """Make a run; `how` is that of `_forked` and `Watch`. Return its exit code or signal, and where it stood."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        shared = {"SFTX_CACHE": os.environ["SFTX_CACHE"]}  # an adapter names the model's path, which is in there
        request = {"folder": str(folder), "words": words, "environment": shared} | how
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def left(self) -> list[int]:
        """Return the processes that runs have left: orphans become children of the process that forks."""
        import psutil

        mine = psutil.Process(self._process.pid).children(recursive=True)
        return [p.pid for p in mine if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


class Watch:
    """Sees the writes of this process to a run folder, and at the k-th of a place does what was asked for.

    `do` is `kill`, `tear` (halve the file that was written last, then kill: a kill amidst a write), `snapshot`
    (copy the folder before this write and each later one: what a kill there would leave), the name of an errno, with
    which this write fails, or the same with `+`: this one and every later one.
    """

    def __init__(
        self, folder: Path, shared: mmap.mmap, do: str | None = None, at: int = 0, where: str = SAVE, into: str = ""
    ) -> None:
        self.folder, self.shared, self.do, self.at, self.where, self.into = str(folder), shared, do, at, where, into
        self.seen: list[tuple[str, str, str]] = []
        self.count = 0
        self.written: str | None = None
        self.refusing = False
        self.guard = threading.local()
        self.phases = ["setup"]

    def install(self) -> None:
        """Watch from now on; there is no way back."""
        import safetensors.torch

        fsync, serialize = os.fsync, safetensors.torch.serialize_file

        def synced(descriptor: int) -> None:
            self.note("fsync", str(Path(f"/proc/self/fd/{descriptor}").readlink()))
            fsync(descriptor)

        def serialized(tensors: Any, name: Any, *rest: Any, **named: Any) -> Any:
            self.note("serialize", str(name))
            return serialize(tensors, name, *rest, **named)

        os.fsync, safetensors.torch.serialize_file = synced, serialized
        self._watch_phases()
        sys.addaudithook(self._heard)

    def _watch_phases(self) -> None:
        import sftx.files
        import sftx.run
        import sftx.runs.end
        import sftx.training.loop
        import sftx.training.measure.evaluate

        def of_folder(phase: str) -> Callable[..., str | None]:
            def chosen(folder: Path, *_: Any) -> str | None:
                if folder.parent.name == "checkpoints":
                    return phase
                return "publishing final" if folder.name == "final" else None

            return chosen

        for function, phase in (
            (sftx.training.loop.train, lambda *_: "stepping"),
            (sftx.training.measure.evaluate.evaluate, lambda *_: "evaluating"),
            (sftx.files.write_folder, of_folder("saving")),
            (sftx.files.remove_folder, of_folder("rotating")),
            (sftx.runs.end.finish_trial, lambda *_: "ending"),
        ):
            self._replace(function, self._in_phase(function, phase))

    def _in_phase(self, function: Callable[..., Any], phase: Callable[..., str | None]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            name = phase(*arguments)
            if name is None:
                return function(*arguments, **named)
            self.phases.append(name)
            self._tell()
            try:
                return function(*arguments, **named)
            finally:
                if name != "ending":  # nothing comes after it
                    self.phases.remove(name)
                self._tell()

        return wrapped

    def _replace(self, function: Callable[..., Any], by: Callable[..., Any]) -> None:
        """Put one function in another's place, by whichever name a module of sftx knows it."""
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] == "sftx":
                for key, value in list(vars(module).items()):
                    if value is function:
                        setattr(module, key, by)

    def _tell(self) -> None:
        """Note the phase where the parent finds it after a kill: that of a save before that of the steps beside it."""
        self.shared[0] = max(map(PHASES.index, self.phases))

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Hear of a call before it is made."""
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.note("open", path)
        elif event == "os.rename":
            self.note("rename", arguments[0], arguments[1])
        elif event in ("os.mkdir", "os.rmdir", "os.remove", "os.chmod", "os.truncate"):
            self.note(event.removeprefix("os."), arguments[0], directory=arguments[-1])

    def note(self, call: str, path: Any, target: Any = None, directory: Any = -1) -> None:
        """Count a write to the run folder."""
        if getattr(self.guard, "inside", False) or not isinstance(path, str | os.PathLike):
            return
        self.guard.inside = True
        try:
            name = os.fspath(path)
            if isinstance(directory, int) and directory >= 0:  # an absolute name stays as it is
                name = Path(f"/proc/self/fd/{directory}").readlink() / name
            name = os.path.abspath(name)  # noqa: PTH100 - no link is followed
            if not name.startswith(self.folder):
                return
            inner = name[len(self.folder) :].lstrip("/")
            place = SAVE if inner.startswith("checkpoints") else FINAL if inner.startswith(("final", ".final")) else RUN
            self.seen.append((place, call, inner + (f" -> {Path(target).name}" if target else "")))
            if self.refusing:
                self._refuse(call, name)
            if place == self.where:
                self.count += 1
                self._act(call, name)
            if call in ("open", "serialize"):
                self.written = name if TEMPORARY in name else None  # what is appended to is never halved by a kill
        finally:
            self.guard.inside = False

    def _act(self, call: str, name: str) -> None:
        text = f"{call} {Path(name).name}".encode()[:200]
        if self.do == "snapshot" and self.count >= self.at:
            shutil.copytree(self.folder, Path(self.into) / f"{self.count:03d}", symlinks=True)
        elif self.do in ("kill", "tear"):
            if self.count != self.at:
                return
            self.shared[1 : 1 + len(text)] = text
            if self.do == "tear" and self.written and Path(self.written).is_file():
                os.truncate(self.written, Path(self.written).stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.do not in (None, "snapshot") and self.count == self.at:
            self.shared[1 : 1 + len(text)] = text
            self.refusing = str(self.do).endswith("+")
            self._refuse(call, name)

    def _refuse(self, call: str, name: str) -> None:
        """Answer as the system does when the disk refuses."""
        number = getattr(errno, str(self.do).rstrip("+"))
        if number == errno.ENOSPC and call in ("remove", "rmdir", "rename", "chmod"):
            return  # a full disk lets go of files
        if call == "serialize":
            from safetensors import SafetensorError

            raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")
        if number in (errno.EACCES, errno.EIO) and call in ("remove", "rmdir"):
            return  # that an unfinished file cannot be removed either is tried with EROFS
        raise OSError(number, os.strerror(number), name)


def _forked(request: dict[str, Any]) -> dict[str, Any]:
    """Fork a run; kill it after `seconds`, if they are given. Return how it ended."""
    folder, shared = Path(request["folder"]), mmap.mmap(-1, 256)
    seen = folder.parent / f"{folder.name}.calls"
    started = time.monotonic()
    child = os.fork()
    if not child:
        os._exit(_run(request, folder, shared, seen))
    if (seconds := request.get("seconds")) is not None:
        until = started + seconds
        while time.monotonic() < until and not _ended(child):
            time.sleep(0.002)
        if not _ended(child):
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    lasted = (ended := time.monotonic()) - started
    calls = json.loads(seen.read_text()) if seen.is_file() else []
    seen.unlink(missing_ok=True)
    told = bytes(shared[1:]).rstrip(b"\0").decode("utf-8", "replace")
    return {
        "code": os.waitstatus_to_exitcode(status), "phase": PHASES[shared[0]], "stage": told, "seconds": lasted, "ended": ended,
        "calls": calls, "orphans": _orphans(child) if request.get("orphans", True) else 0,
    }  # fmt: skip


def _ended(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _orphans(group: int) -> float:
    """Return how many seconds the processes that a run had started outlived it; -1 when they still do."""
    started = time.monotonic()
    while time.monotonic() < started + 15:
        with suppress(ChildProcessError):  # none of them is this process's own, or none is left
            while os.waitpid(-group, os.WNOHANG)[0]:
                continue
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return round(time.monotonic() - started, 2)
        time.sleep(0.01)
    os.killpg(group, signal.SIGKILL)
    return -1.0


def _run(request: dict[str, Any], folder: Path, shared: mmap.mmap, seen: Path) -> int:
    """Make one run in a session of its own; what it says goes to a file beside its folder."""
    os.setsid()
    said = os.open(
        request.get("said") or folder.parent / f"{folder.name}.said", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666
    )
    for standard in (0, 1, 2):
        os.dup2(said if standard else os.open(os.devnull, os.O_RDONLY), standard)
    code = 1
    try:
        from sftx.config.checks.check import freeze
        from sftx.config.composition.prepare import compose_checked
        from sftx.errors import reported
        from sftx.runs.launch import launch
        from sftx.signals import Signals

        os.environ |= request.get("environment", {})
        watch = Watch(folder, shared, **request.get("watch", {}))
        watch.install()
        if "ranks" in request:
            fork_ranks(request["ranks"])
        if "moment" in request:
            Moments(**request["moment"]).install()
        with reported(), Signals(whole_program=True):  # as train.py does
            launch([freeze(compose_checked(request["words"]))], [], "python train.py")
        code = 0
    except SystemExit as left:
        code = int(left.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        if request.get("calls") and "watch" in dir():
            seen.write_text(json.dumps(watch.seen))
    return code


def warm(do: Callable[[], object]) -> None:
    """Import what a function has imported at its end, run in a process that is forked: threads end with it."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        do()
        os.write(writer, json.dumps([m for m in sys.modules if m.split(".")[0] in WARM]).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as told:
        modules = json.load(told)
    os.waitpid(child, 0)
    for name in modules:
        with suppress(Exception):  # a name that only exists in the run
            importlib.import_module(name)


def own_output() -> IO[str]:
    """Return the standard output, in which nobody else writes from here on: libraries say things when imported."""
    own = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return own


def main() -> None:
    """Fork the runs that standard input asks for, one a line."""
    out = own_output()
    import tempfile

    import torch

    torch.set_num_threads(1)
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    from tests.faults.runs import composed

    import sftx.run

    with tempfile.TemporaryDirectory(prefix="sftx-zygote-") as folder:
        warm(lambda: sftx.run.run([composed(Path(folder) / "run")]))
    for line in sys.stdin:
        print(json.dumps(_forked(json.loads(line))), file=out)


if __name__ == "__main__":
    main()
