"""Files that are either whole or not there, and readable by their owner only."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from gapweave.shared.errors import DataError, UsageError


def write_atomically(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Write a file so that a crash leaves the old content or the new one, never a part.

    Args:
        path: the file.
        content: of it.
        durable: sync file and folder, so that the new content also survives a power cut.

    Raises:
        OSError: naming the file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with naming(path):
        try:
            _write(temporary, content, durable)
            temporary.replace(path)
            if durable:
                sync_folder(path.parent)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Say which file an error is about that comes up here: of a full disk the system does not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def try_lock(file: IO[str] | int, kind: int) -> bool:
    """Lock a file or folder if no other process holds it; the lock ends with the process, however that ends.

    Args:
        file: open, or a descriptor.
        kind: `fcntl.LOCK_EX` or `fcntl.LOCK_SH`.
    """
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def alone(folder: Path, patience_s: float = 0) -> Iterator[None]:
    """Be the only process that writes into a folder, where its file system has locks.

    Args:
        folder: that is there.
        patience_s: how long to wait for another one to end.

    Raises:
        UsageError: when another one does.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    deadline = time.monotonic() + patience_s
    try:
        with suppress(OSError):  # a network's file system may lock no folders
            while not try_lock(descriptor, fcntl.LOCK_EX):
                if time.monotonic() < deadline:
                    time.sleep(0.1)
                    continue
                raise UsageError(
                    "another process works in this folder", where=str(folder), remedy="Wait for it, or stop it"
                )
        yield
    finally:
        os.close(descriptor)


@contextmanager
def intact(path: Path) -> Iterator[None]:
    """Say which of our own files it is whose content cannot be read: half of it was copied, say.

    Raises:
        DataError: in place of what its reader stumbled over.
    """
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DataError(
            "the file is damaged or incomplete", where=str(path), remedy="Copy it again, or restore it from a backup"
        ) from None


def _write(path: Path, content: bytes, durable: bool) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        if durable:
            os.fsync(file.fileno())


def write_new(path: Path, text: str) -> None:
    """Write a text file that must not exist yet.

    Raises:
        UsageError: when it does, or its folder cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UsageError("the file exists", where=str(path), remedy="Give another name") from None
    except OSError as error:
        raise UsageError(f"cannot write ({error.strerror})", where=str(path), remedy="Check the folder") from None


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def private_folder(folder: Path, *, durable: bool = True) -> Path:
    """Create a folder that only its owner may enter.

    Args:
        folder: which, with those above it.
        durable: sync the ones above, since what is synced in a folder must not be lost with its name.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(new):
        path.mkdir(exist_ok=True, mode=0o700)  # each of them: `parents` would leave those above open
        if durable:
            sync_folder(path.parent)
    return folder
