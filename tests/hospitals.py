"""Little federations on disk, and the messages that their sites get."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from cohorts import LABS, NOTE, VITALS, Hospital, study
from flwr.app import Message, RecordDict

from gapweave.client import app as client_app
from gapweave.client.participant import Participant
from gapweave.shared.config.study import Study
from gapweave.sites.simulate.grid import InlineGrid

KINDS = {"labs": LABS, "note": NOTE, "vitals": VITALS}


def plan_of(*, private: bool, **keys: Any) -> Study:
    """Three kinds of data; two rounds; with privacy every patient enters every step, which plans fast."""
    content: dict[str, Any] = {
        "model": {"embedding": 4},
        "training": {"rounds": 3, "local_steps": 1, "batch": 1000, "lr": 0.5},
        "privacy": {"enabled": private, "epsilon": 8},
        "evaluation": {"test_fraction": 0.0},
        "sharing": {"policy": "all"},
        "aggregation": {"quorum": 1, "deadline_s": 20},
    }
    for name, value in keys.items():
        content[name] = {**content.get(name, {}), **value} if isinstance(value, dict) else value
    return study(KINDS, **content)


def build(folder: Path, name: str, held: Iterable[str] = KINDS, patients: int = 24, seed: int = 0) -> Hospital:
    """A hospital whose files hold something to learn; its site file is written by `publish`."""
    folder.mkdir(parents=True)
    hospital = Hospital(folder, name)
    generator = np.random.default_rng([seed, *name.encode()])
    label = [row % 2 for row in range(patients)]
    hospital.records(patients, y=label)
    ids = [f"r{row}" for row in range(patients)]
    if "labs" in held:
        hospital.labs(patients, na=[138 + 6 * y + float(generator.normal(0, 3)) for y in label])
    if "note" in held:
        words = ["cough fever", "clear well"]
        hospital.write("note.csv", {"id": ids, "text": [f"{words[y]} day{generator.integers(5)}" for y in label]})
        hospital.add("note", file="note.csv", columns=["text"])
    if "vitals" in held:
        hours = [float(generator.integers(0, 24)) for _ in label]
        pressure = [120 + 20 * y + float(generator.normal(0, 9)) for y in label]
        hospital.write("vitals.csv", {"id": ids, "hour": hours, "bp": pressure})
        hospital.add("vitals", file="vitals.csv", time="hour", columns={"bp": "bp"})
    hospital.update("policy", epsilon=10.0, min_patients=5)
    return hospital


def publish(hospital: Hospital) -> Path:
    hospital.site_file.write_text(yaml.safe_dump(hospital.content), encoding="utf-8")
    return hospital.site_file


def participant(hospital: Hospital, of: Study, state: Path | None = None, *, simulation: bool = True) -> Participant:
    return Participant(
        of,
        hospital.site,
        site_file=hospital.site_file,
        state=hospital.folder / "state" if state is None else state,
        simulation=simulation,
    )


def node(hospital: Hospital, *, simulation: bool = True) -> dict[str, Any]:
    """The node configuration of a site, simulated or deployed."""
    config: dict[str, Any] = {"site": str(publish(hospital))}
    if simulation:
        config |= {"state": str(hospital.folder / "state"), "simulation": True}
    return config


class Wire(InlineGrid):
    """The inline grid, which keeps what crossed it: (message type, node, content down, content up)."""

    def __init__(self, hospitals: Sequence[Hospital], *, simulation: bool = True, app: Any = None) -> None:
        super().__init__(app or client_app.app, [node(hospital, simulation=simulation) for hospital in hospitals])
        self.names = {1000 + at: hospital.content["name"] for at, hospital in enumerate(hospitals)}
        self.log: list[tuple[str, str, RecordDict, RecordDict]] = []

    def _answer(self, message: Message) -> Message:
        reply = super()._answer(message)
        name = self.names[message.metadata.dst_node_id]
        self.log.append((message.metadata.message_type, name, message.content, reply.content))
        return reply

    def ask(self, kind: str, content: RecordDict, at: int = 0) -> Message:
        """Send one message to the site at a position, and wait."""
        (reply,) = self.send_and_receive([Message(content, 1000 + at, kind, group_id=kind)])
        return reply


def die(*_: object) -> None:
    """Put in the place of what a site is about to do: a crash just before it."""
    raise RuntimeError("the machine died")
