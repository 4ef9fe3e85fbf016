"""The one module that writes files: everything is written under a temporary name, flushed to disk, then renamed."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sftx.errors import RunFolderError

CAUSES = {
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ENOTDIR: "a file is where a folder should be",
    errno.EDQUOT: "the disk quota is used up",
    errno.ENOENT: "no file can be made there",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EINVAL: "the name is not allowed there",
    errno.ELOOP: "the links lead in a circle",
    errno.EIO: "the disk failed",
}

TEMPORARY = ".sftx-tmp"
"""How the name ends of what is not published yet: nobody else's file is called so."""
REPLACED = f".replaced{TEMPORARY}"
"""How the name ends of a folder while another is put in its place."""


def cache_root() -> Path:
    """Return the folder of what can be rebuilt: `$SFTX_CACHE`, or `~/.cache/sftx`."""
    return Path(os.environ.get("SFTX_CACHE") or Path.home() / ".cache" / "sftx")


@contextmanager
def explained(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn the operating system's refusal to write into one message with the path and the cure.

    `needed` is how many bytes were to be written, where that is known.
    """
    try:
        yield
    except Exception as error:
        number = _error_number(error)
        if number is None:
            raise
        inside = cache_root() in (path, *path.parents)
        elsewhere = "set SFTX_CACHE to a folder with room" if inside else "choose another output_dir"
        if number == errno.ENOSPC:
            free = shutil.disk_usage(_existing(path)).free
            room = f"{free:,} bytes free" + (f", {needed:,} needed" if needed is not None else "")
            raise RunFolderError(
                f"{path}: the disk is full ({room}). Free some space, lower save_total_limit, "
                f"or {elsewhere}; then run the same command again."
            ) from error
        cause = CAUSES.get(number)
        if cause is None:
            raise
        raise RunFolderError(f"{path}: cannot be written: {cause}. {elsewhere[0].upper()}{elsewhere[1:]}.") from error


def _error_number(error: Exception) -> int | None:
    """Return the operating system's error number; safetensors puts it into its own error's text."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found.group(1)) if found else None


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def check_writable(folder: Path) -> None:
    """Raise if a folder could not be made and written, leaving nothing behind.

    Raises:
        RunFolderError: read-only, no permission, or a file in the way.
    """
    parent = _existing(folder)
    with explained(folder):
        if not parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(parent))
        with tempfile.TemporaryFile(dir=parent):
            pass


def write_chunks(path: Path, chunks: Iterable[bytes], *, needed: int | None = None) -> None:
    """Write a file atomically, from chunks that need not fit into memory together; see `write_folder`."""
    with explained(path, needed):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
        try:
            with os.fdopen(handle, "wb") as file:
                for chunk in chunks:
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(0o666 & ~_umask())
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically."""
    write_chunks(path, [data], needed=len(data))


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2, sort_keys=False) + "\n")


def write_folder(
    folder: Path, fill: Callable[[Path], None], *, replace: bool = False, needed: int | None = None
) -> None:
    """Let `fill` write a temporary folder, then publish it under its name in one rename.

    `needed` is about how many bytes that are, for the message when the disk is full.
    Of two processes that publish the same folder at once, one wins and the other's copy is dropped,
    unless `replace`, which puts the new one in the old one's place: the old one is renamed first and removed last, so
    that after a kill in between `sweep` can put it back.
    """
    aside = folder.with_name(f".{folder.name}{REPLACED}")
    with explained(folder, needed), _filled(folder, fill) as temporary:
        temporary.chmod(0o777 & ~_umask())
        if replace and folder.exists():
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
        try:
            temporary.rename(folder)
        except OSError:
            if aside.exists():
                aside.rename(folder)
                raise
            if not folder.is_dir():
                raise
        _sync(folder.parent)
        shutil.rmtree(aside, ignore_errors=True)


def replace_link(link: Path, target: Path) -> None:
    """Let a symbolic link lead to a target, in one rename; the target is written relative to the link's folder.

    Raises:
        OSError: the disk has no links, or something that is no link has the name.
    """
    if link.exists() and not link.is_symlink():
        raise FileExistsError(errno.EEXIST, "exists and is not a link", str(link))
    temporary = link.with_name(f".{link.name}.{os.getpid()}{TEMPORARY}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target, link.parent))
    try:
        temporary.replace(link)
    except OSError:
        temporary.unlink()
        raise


def rehearse_folder(folder: Path, fill: Callable[[Path], None], needed: int) -> int:
    """Write a folder as `write_folder` does, but remove it again; return its bytes."""
    with explained(folder, needed), _filled(folder, fill) as temporary:
        return bytes_in(temporary)


@contextmanager
def _filled(folder: Path, fill: Callable[[Path], None]) -> Iterator[Path]:
    """Yield a temporary folder, written and flushed to disk; it is removed unless it was renamed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=TEMPORARY))
    try:
        fill(temporary)
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(0o666 & ~_umask())  # safetensors makes files that only their owner can read
                _sync(file)
        _sync(temporary)
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def bytes_in(folder: Path) -> int:
    """Return the bytes of all files in a folder; 0 where there is none."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def free_bytes(folder: Path) -> tuple[int, int]:
    """Return the free bytes of the disk on which a folder is or would be, and that disk's number."""
    there = _existing(folder)
    return shutil.disk_usage(there).free, there.stat().st_dev


def remove_folder(folder: Path) -> None:
    """Remove a folder in one step: no half of it is ever seen under its name."""
    with explained(folder):
        aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=TEMPORARY))
        try:
            folder.rename(aside)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what processes that were killed left behind, and put back what they were replacing.

    Only while no process writes there.
    """
    for aside in folder.glob(f".*{REPLACED}") if folder.is_dir() else ():
        published = aside.with_name(aside.name[1 : -len(REPLACED)])
        if not published.exists():
            aside.rename(published)
    for left in folder.glob(f".*{TEMPORARY}") if folder.is_dir() else ():
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def append_line(path: Path, line: str) -> None:
    """Append one line in one write."""
    with explained(path), path.open("ab") as file:
        file.write(line.encode("utf-8") + b"\n")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
