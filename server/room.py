"""Room on the hub's disk: asked for before work that needs it, and watched while the SuperLink runs.

A SuperLink whose database finds no room answers with errors that make sites and runs give up, and cannot even note that
they did. So it ends before that, waits for room, and comes back: to everybody else it is one that was down for a while.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from pathlib import Path

from gapweave.shared.errors import Unreachable

LEAST = 50_000_000
"""Bytes below which a hub does not serve: logs, notes of a failure and the database's own log must still fit."""
LOOK_S = 1.0
"""Seconds between two looks at a disk."""

log = logging.getLogger("gapweave")


def free(folder: Path) -> int:
    """Bytes that are free where a folder is."""
    return shutil.disk_usage(folder).free


def lacking(folder: Path, needed: int = 0) -> Unreachable | None:
    """The error that says so when a disk has no room.

    Args:
        folder: on the disk.
        needed: bytes, beside those that must stay free.
    """
    found = free(folder)
    if found >= LEAST + needed:
        return None
    return Unreachable(
        f"no space left: {found / 1e6:.0f} MB are free, the hub needs {(LEAST + needed) / 1e6:.0f} MB",
        where=str(folder),
        remedy="Free some; it then goes on by itself, and `gapweave resume RUN_ID --server NAME` continues a run",
    )


def require(folder: Path, needed: int = 0) -> None:
    """Refuse work that a disk has no room for.

    Args:
        folder: on the disk.
        needed: bytes, beside those that must stay free.

    Raises:
        Unreachable: naming what is free and what is needed.
    """
    error = lacking(folder, needed)
    if error is not None:
        raise error


def keep(folder: Path) -> None:
    """Wait until a disk has room, then end this process as soon as it has none."""
    if lacking(folder):
        log.error("%s", lacking(folder))
        while lacking(folder):
            time.sleep(LOOK_S)
    threading.Thread(target=_end_without, args=(folder,), daemon=True).start()


def _end_without(folder: Path) -> None:
    while not lacking(folder):
        time.sleep(LOOK_S)
    log.error("ending: %s", lacking(folder))
    os._exit(1)  # what it was writing is in the database's own log, or was refused
