"""The server's state after a round: one file, replaced in one rename."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gapweave.shared import tensorfile
from gapweave.shared.errors import UsageError
from gapweave.shared.files import write_atomically
from gapweave.shared.tensorfile import Arrays

FILE = "server.safetensors"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What `resume` needs.

    Attributes:
        run: our own id of the run, kept over resumes.
        study: hash of the study.
        round: last round done; 0 before the first.
        groups: the shared groups after it.
        peers: what is known of each site, by name.
        bytes_up: bytes of updates received so far.
        bytes_down: bytes of groups sent so far.
        seconds: time spent in rounds so far.
    """

    run: str
    study: str
    round: int
    groups: Arrays
    peers: dict[str, dict[str, Any]] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Replace the checkpoint durably."""
    folder.mkdir(parents=True, exist_ok=True)
    note = {key: value for key, value in asdict(checkpoint).items() if key != "groups"}
    write_atomically(folder / FILE, tensorfile.dump(checkpoint.groups, note))


def load_checkpoint(folder: Path, study: str) -> Checkpoint | None:
    """Read the checkpoint, if there is one.

    Raises:
        UsageError: when it belongs to another study.
    """
    file = folder / FILE
    if not file.exists():
        return None
    groups, note = tensorfile.parse(file.read_bytes())
    if note["study"] != study:
        raise UsageError(
            "the checkpoint belongs to another study",
            where=str(file),
            remedy="Resume with the run's own study.yaml",
        )
    return Checkpoint(groups=groups, **note)
