"""The server's state after a round: one file, replaced in one rename."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gapweave.shared import PROTOCOL_VERSION, tensorfile
from gapweave.shared.errors import UsageError
from gapweave.shared.files import intact, write_atomically
from gapweave.shared.tensorfile import Arrays

FILE = "server.safetensors"
BY_GROUP = ("late", "common")
"""Fields of arrays by group."""
BY_SITE = ("history", "variates")
"""Fields of arrays by site and group."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What `resume` needs.

    Attributes:
        run: our own id of the run, kept over resumes.
        study: hash of the study.
        round: last round done; 0 before the first.
        groups: the shared groups after it.
        moments: of the server optimiser, by moment and group.
        history: sums of each site's updates, by site; `counts`: how many they hold, by site and group.
        variates: control variates of SCAFFOLD, by site and group; `common`: what the rules make of them.
        late: sums of the shared groups after late rounds, which are averaged; empty before.
        noise: by group and round, the variance of the noise in each coordinate of the aggregate.
        looks: at the scores on the way, as logged.
        peers: what is known of each site, by name.
        bytes_up: bytes of updates received so far.
        bytes_down: bytes of groups sent so far.
        seconds: time spent in rounds so far.
    """

    run: str
    study: str
    round: int
    groups: Arrays
    moments: dict[str, Arrays] = field(default_factory=dict)
    history: dict[str, Arrays] = field(default_factory=dict)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    variates: dict[str, Arrays] = field(default_factory=dict)
    common: Arrays = field(default_factory=dict)
    late: Arrays = field(default_factory=dict)
    noise: dict[str, list[float]] = field(default_factory=dict)
    looks: list[dict[str, Any]] = field(default_factory=list)
    peers: dict[str, dict[str, Any]] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Replace the checkpoint durably."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = {item.name: getattr(checkpoint, item.name) for item in dataclasses.fields(Checkpoint)}
    arrays: Arrays = dict(fields.pop("groups"))
    by_site = {f"{name}/{site}": groups for name in BY_SITE for site, groups in fields.pop(name).items()}
    by_group = {name: fields.pop(name) for name in BY_GROUP}
    for moment, groups in {**fields.pop("moments"), **by_site, **by_group}.items():
        arrays |= {f"{moment}:{group}": part for group, part in groups.items()}
    write_atomically(folder / FILE, tensorfile.dump(arrays, {"protocol": PROTOCOL_VERSION, **fields}))


def load_checkpoint(folder: Path, study: str) -> Checkpoint | None:
    """Read the checkpoint, if there is one.

    Raises:
        UsageError: when it belongs to another study, or was written under another protocol.
        DataError: when it is damaged.
    """
    file = folder / FILE
    if not file.exists():
        return None
    with intact(file):
        return _read(file, study)


def _read(file: Path, study: str) -> Checkpoint:
    arrays, note = tensorfile.parse(file.read_bytes())
    protocol = note.pop("protocol", None)
    if protocol != PROTOCOL_VERSION:
        raise UsageError(
            f"the checkpoint was written under protocol {protocol}, this version speaks {PROTOCOL_VERSION}",
            where=str(file),
            remedy="Resume with the version that began the run",
        )
    if note["study"] != study:
        raise UsageError(
            "the checkpoint belongs to another study",
            where=str(file),
            remedy="Resume with the run's own study.yaml",
        )
    groups: Arrays = {}
    moments: dict[str, Arrays] = {}
    for key, part in arrays.items():
        moment, _, group = key.rpartition(":")
        (moments.setdefault(moment, {}) if moment else groups)[group] = part
    late, common = (moments.pop(name, {}) for name in BY_GROUP)
    by_site: dict[str, dict[str, Arrays]] = {name: {} for name in BY_SITE}
    for key in list(moments):
        name, _, site = key.partition("/")
        if name in by_site:
            by_site[name][site] = moments.pop(key)
    history, variates = (by_site[name] for name in BY_SITE)
    return Checkpoint(
        groups=groups, moments=moments, history=history, variates=variates, late=late, common=common, **note
    )
