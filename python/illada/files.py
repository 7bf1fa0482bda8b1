"""Files and folders that appear complete or not at all, and locks for one writing process at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import io
import os
import re
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_RANDOM = "[a-z0-9_]{8}"  # what tempfile appends
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)  # of a file system that has none


@contextlib.contextmanager
def staged_directory(target: str | Path) -> Iterator[Path]:
    """Make a hidden folder beside `target` to write into, and rename it to `target` on success.

    It is synced to disk before the rename.

    A folder already at `target` steps aside for the rename and is removed after it, so that at every moment, a kill or
    a power cut included, one complete folder is there (or, between two renames, beside it: `recover` brings it back).
    On an error the hidden folder is removed and `target` stays as it was. Links are followed; modes follow the umask.

    Raises:
        ValueError, NotADirectoryError: `target` is what no folder can replace. BlockingIOError: another process is
            writing it.
    """
    target = folder_to_write(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _named(target), locked(_lock_of(target), f"{target} is being written"):
        _recover(target)
        staging, old = Path(tempfile.mkdtemp(prefix=f".{target.name}.new.", dir=target.parent)), None
        try:
            yield staging
            _open_by_umask(staging)
            for path in staging.rglob("*"):
                _sync(path)
            _sync(staging)
            if target.exists():
                old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
                os.rename(target, old / target.name)
            os.rename(staging, target)
            _sync(target.parent)
        except BaseException:
            if old is not None and not target.exists():
                os.rename(old / target.name, target)
            shutil.rmtree(staging, ignore_errors=True)
            raise
        finally:
            if old is not None and target.exists():
                shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _named(target: Path) -> Iterator[None]:
    """Name the file that is being written in an OSError that names none, as of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(target)
        raise


def folder_to_write(target: str | Path) -> Path:
    """Return the folder that `target` leads to, links followed, which may be absent.

    ValueError: this process stands in it. NotADirectoryError: something else is there.
    """
    found = Path(os.path.realpath(target))
    if found.exists() and not found.is_dir():
        raise NotADirectoryError(f"{target} is not a folder; choose another name")
    if Path.cwd().is_relative_to(found):
        raise ValueError(f"{target} is the current folder or above it, and cannot be replaced; name another folder")
    return found


def recover(target: str | Path) -> None:
    """Tidy up after killed writers of `target`.

    The old folder comes back where there is no new one.
    """
    target = Path(os.path.realpath(target))
    if _left_of(target, "new") or _left_of(target, "old"):
        with locked(_lock_of(target), f"{target} is being written"):
            _recover(target)


def _recover(target: Path) -> None:
    for old in _left_of(target, "old"):
        if not target.exists() and (old / target.name).is_dir():
            os.rename(old / target.name, target)
            _sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    for new in _left_of(target, "new"):
        shutil.rmtree(new, ignore_errors=True)


def _left_of(target: Path, kind: str) -> list[Path]:
    pattern = re.compile(rf"\.{re.escape(target.name)}\.{kind}\.{_RANDOM}")
    found = target.parent.glob(f".{glob.escape(target.name)}.{kind}.*")
    return sorted(path for path in found if pattern.fullmatch(path.name) and path.is_dir())


def _lock_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.lock")


@contextlib.contextmanager
def locked(file: Path, busy: str) -> Iterator[None]:
    """Hold a lock file that no other process can hold.

    It has this process's id and host in it, and is removed at the end.

    The lock ends with the process, so what a killed one leaves is taken by the next. Where the file system has no
    locks, nothing is held.

    Raises:
        BlockingIOError: another process holds it: `busy`, with its id and host.
    """
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise BlockingIOError(
                f"{busy} by another process ({holder or 'just started'}); {file} is its lock"
            ) from None
        except OSError as error:
            os.close(descriptor)
            if error.errno not in _NO_LOCKS:
                raise
            descriptor = -1
            break
        if _is_at(file, descriptor):
            break
        os.close(descriptor)  # its holder removed it between our opening and our locking
    try:
        if descriptor >= 0:
            with contextlib.suppress(OSError):  # a full disk holds a lock, too
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        try:
            file.unlink(missing_ok=True)  # before it is let go: no other process holds a file that is gone
        finally:
            if descriptor >= 0:
                os.close(descriptor)


def _is_at(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def append(file: Path, lines: str) -> None:
    """Append lines to a file and sync them.

    They begin on a line of their own where a kill cut the last one short.
    """
    with _named(file), file.open("a+b") as stream:
        if size := stream.tell():
            stream.seek(size - 1)
            if stream.read(1) != b"\n":
                lines = f"\n{lines}"
        stream.write(lines.encode())
        stream.flush()
        os.fsync(stream.fileno())


@contextlib.contextmanager
def replaced(file: str | Path) -> Iterator[BinaryIO]:
    """Open a stream whose bytes become `file`.

    Readers see the old file or the new one, never a part.

    Links are followed, and what they lead to is replaced. A device, a pipe and a descriptor are written to as they are.
    The mode of a file that was there stays.
    """
    if is_stream(file):
        buffer = io.BytesIO()
        yield buffer
        with open(file, "ab") as stream:
            stream.write(buffer.getvalue())
        return
    file = Path(os.path.realpath(file))
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a folder, not a file")
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.unlink(missing_ok=True)  # of a killed process
    try:
        with _named(file), temporary.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        if file.exists():
            shutil.copymode(file, temporary)
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def is_stream(file: str | Path) -> bool:
    """Return whether a path leads to a device, pipe or open descriptor.

    Such a stream cannot be replaced and read again.
    """
    if os.path.abspath(file).startswith(("/dev/fd/", "/dev/std", "/proc/")):
        return True
    try:
        mode = os.stat(file).st_mode
    except FileNotFoundError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def write_text(file: str | Path, text: str) -> None:
    """Write a text file as `replaced` does."""
    with replaced(file) as stream:
        stream.write(text.encode())


def check_inside(file: Path, folder: Path) -> None:
    """Raise ValueError if `file` is a link that leaves its folder.

    Blobs of a Hugging Face cache belong to the folder.
    """
    real, home = file.resolve(), folder.resolve()
    blobs = home.parent.parent / "blobs"
    if not (real.is_relative_to(home) or (home.parent.name == "snapshots" and real.parent == blobs)):
        raise ValueError(f"{file} is a link out of its folder, to {real}; put the file itself there")


def remove_directory(path: str | Path) -> None:
    """Remove a folder, which is first hidden by a rename.

    So a kill never leaves a part of it under its name.
    """
    path = Path(path)
    gone = Path(tempfile.mkdtemp(prefix=f".{path.name}.gone.", dir=path.parent))
    os.rename(path, gone)
    _sync(path.parent)
    shutil.rmtree(gone, ignore_errors=True)


def remove_stale(parent: str | Path) -> None:
    """Remove what killed `staged_directory` and `remove_directory` left in a folder.

    Only this process may write to the folder.
    """
    for pattern in (".*.new.*", ".*.gone.*"):
        for path in Path(parent).glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
    for path in Path(parent).glob(".*.lock"):
        path.unlink(missing_ok=True)


def _open_by_umask(staging: Path) -> None:
    """Set modes as mkdir and open would, because temporary folders and weights are made private."""
    probe = staging / ".mode"
    probe.mkdir()  # asking for the umask would change it, for all threads
    mode = stat.S_IMODE(probe.stat().st_mode) & 0o777
    probe.rmdir()
    os.chmod(staging, mode)
    for path in staging.rglob("*"):
        os.chmod(path, mode if path.is_dir() else mode & 0o666)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
