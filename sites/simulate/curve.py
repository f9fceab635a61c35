"""The learning curve of a simulation: exact metrics of the global model at some rounds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Protocol

from gapweave.client.participant import Participant
from gapweave.server.peers import Peer
from gapweave.server.strategy import Observer
from gapweave.shared.config import Study
from gapweave.shared.metrics import Metrics
from gapweave.shared.rundir import RunDirectory
from gapweave.shared.tensorfile import Arrays
from gapweave.sites.simulate.evaluate import evaluate, mean_metrics

POINTS = 12
"""About how many rounds are looked at."""


class Watcher(Protocol):
    """Who shows a simulation's progress."""

    def prepared(self, sites: int, rounds: int, done: int) -> None:
        """The handshake is over."""
        ...

    def replied(self, number: int, site: str) -> None:
        """A site answered."""
        ...

    def round_done(self, number: int, auroc: float | None) -> None:
        """A round is over; its mean AUROC, when it was looked at."""
        ...

    def baseline(self, name: str) -> None:
        """A baseline is being fitted."""
        ...


class Curve(Observer):
    """An observer of the round loop that evaluates and writes RUN/curve.jsonl.

    Args:
        study: of the run.
        sites: participants by name.
        directory: of the run.
        watcher: told of progress.
    """

    def __init__(
        self, study: Study, sites: Mapping[str, Participant], directory: RunDirectory, watcher: Watcher
    ) -> None:
        self.run = ""
        self._peers: Mapping[str, Peer] = {}
        self._study, self._sites, self._file, self._watcher = (
            study,
            sites,
            directory.path / "curve.jsonl",
            watcher,
        )
        rounds = study.training.rounds
        self._rounds = {max(1, round(rounds * at / POINTS)) for at in range(1, POINTS + 1)}
        self._done = max((line["round"] for line in directory.rounds()), default=0)

    def prepared(self, peers: dict[str, Peer]) -> None:
        """Tell the watcher, and remember who takes part."""
        self._peers = peers
        active = sum(peer.status == "ok" for peer in peers.values())
        self._watcher.prepared(active, self._study.training.rounds, self._done)

    def replied(self, number: int, site: str) -> None:
        """Tell the watcher."""
        self._watcher.replied(number, site)

    def round_done(self, number: int, current: Arrays) -> None:
        """Evaluate at some rounds, where anybody is held out."""
        due = number in self._rounds and self._held_out
        self._watcher.round_done(number, self._look(number, current) if due else None)

    @cached_property
    def _held_out(self) -> bool:
        return any(bool(site.cohort.test.any()) for site in self._sites.values())

    def exact_aurocs(self, current: Arrays) -> dict[str, float | None]:
        """For an early stop without privacy."""
        return {name: metrics["auroc"] for name, metrics in self._metrics(current).items()}

    def _metrics(self, current: Arrays) -> dict[str, Metrics]:
        metrics = {}
        for name, site in self._sites.items():
            if name not in self._peers or not self._peers[name].groups:
                continue  # it never took part: it has no model, and planning one would open its ledger
            shared = {group: current[group] for group in site.shared}
            metrics[name] = evaluate(site.assemble(self.run, shared), site.cohort, self._study)
        return metrics

    def _look(self, number: int, current: Arrays) -> float | None:
        metrics = self._metrics(current)
        mean = mean_metrics(list(metrics.values()))
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"round": number, "mean": mean, "sites": metrics}) + "\n")
        return mean["auroc"]
