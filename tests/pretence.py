"""Sites that only pretend: each adds its own number to everything that it gets, or whatever a test makes it do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Error, Message, RecordDict
from hospitals import plan_of

from gapweave.server.strategy import RoundLoop
from gapweave.shared import wire
from gapweave.shared.config.study import Study
from gapweave.shared.rundir import RunDirectory
from gapweave.shared.tensorfile import Arrays
from gapweave.sites.simulate.grid import InlineGrid

RUN = "run-1"
ALL = ["encoder/labs", "encoder/note", "encoder/vitals", "fusion", "head/labs", "head/note", "head/vitals", "imputer"]

Answer = tuple[dict[str, Any], Any]


@dataclass
class Pretender:
    """A site without data. What it does wrong is set by the test."""

    name: str
    step: float = 1.0
    groups: list[str] = field(default_factory=lambda: list(ALL))
    status: dict[int, str] = field(default_factory=dict)
    error: str = "GapweaveError"
    alter: Callable[[int, Arrays], Arrays] = lambda number, arrays: arrays
    hello: dict[str, Any] = field(default_factory=dict)

    def prepare(self) -> Answer:
        status = self.status.get(0, "ok")
        return {
            "status": status,
            "site": self.name,
            "text": f"text of {self.name}",
            **self._declares(),
            **self.hello,
        }, {}

    def _declares(self) -> dict[str, Any]:
        return {"modalities": ["labs"], "groups": self.groups, "rounds": 9, "plan": {}}

    def train(self, number: int, arrays: Arrays) -> Answer:
        status = self.status.get(number, "ok")
        if status != "ok":
            return {"status": status, "error": self.error, "text": f"text of {self.name}"}, {}
        update = {
            group: {name: np.full_like(value, self.step) for name, value in part.items()}
            for group, part in arrays.items()
        }
        return {"status": "ok", "round": number}, self.alter(number, update)


class Pretence(InlineGrid):
    """A grid of pretenders; `deaf` ones never answer a round."""

    def __init__(self, *sites: Pretender, deaf: dict[str, set[int]] | None = None) -> None:
        super().__init__(self.answer, [{"name": site.name} for site in sites])
        self.sites = {1000 + at: site for at, site in enumerate(sites)}
        self.deaf = deaf or {}
        self.asked: list[tuple[str, str, int]] = []

    def answer(self, message: Message, context: Context) -> Message:
        site, kind = self.sites[context.node_id], message.metadata.message_type
        header, arrays = wire.unpack(message.content)
        number = header.get("round", 0)
        self.asked.append((kind, site.name, number))
        if kind == wire.PREPARE:
            reply = site.prepare()
        elif kind == wire.TRAIN:
            reply = site.train(number, arrays)
        else:
            reply = ({"status": "ok"}, {})
        if isinstance(reply, Error):
            return Message(reply, reply_to=message)
        content = reply if isinstance(reply, RecordDict) else wire.pack(*reply)
        return Message(content, reply_to=message)

    def pull_messages(self, message_ids: Any) -> list[Message]:
        return super().pull_messages([identity for identity in message_ids if not self._is_deaf(identity)])

    def _is_deaf(self, identity: str) -> bool:
        message = self._queue.get(identity)
        if message is None or message.metadata.message_type != wire.TRAIN:
            return False
        site = self.sites[message.metadata.dst_node_id]
        return wire.unpack(message.content)[0]["round"] in self.deaf.get(site.name, set())


def loop(tmp_path: Path, of: Study, grid: InlineGrid, run: str = RUN) -> RoundLoop:
    path = tmp_path / "run"
    directory = RunDirectory.open(path) if path.exists() else RunDirectory.create(path, of)
    return RoundLoop(grid, of, directory, run)


def study_of(quorum: int = 2, **keys: Any) -> Study:
    aggregation = {"default": "mean", "quorum": quorum, "deadline_s": 5, **keys.pop("aggregation", {})}
    return plan_of(private=False, aggregation=aggregation, **keys)


def moved(before: Arrays, after: Arrays) -> dict[str, float]:
    """By how much each group moved; it must be one number all over."""
    result = {}
    for group, part in after.items():
        steps = np.concatenate([(value - before[group][name]).ravel() for name, value in part.items()])
        assert np.allclose(steps, steps[0], atol=1e-5), group
        result[group] = round(float(steps[0]), 3)
    return result
