"""Asking sites how well a model does, at the end or on the way: each answers with a noised table, or says why not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.serverapp import Grid

from gapweave.server.mail import Answer, ask
from gapweave.server.peers import NO_NODE, Peer
from gapweave.shared import wire
from gapweave.shared.config.study import Study
from gapweave.shared.privacy.once import NOT_ASKED, held_out, look_scale, problems, table_scale
from gapweave.shared.tables import Scores, ScoreTable, mean_table_metrics, pooled, read_tables, table_metrics
from gapweave.shared.tensorfile import Arrays

NO_ANSWER = "the site did not answer"
UNREADABLE = "the site sent something else than a table"
TOO_MANY = "the site's table holds more patients than it has by its own plan"
SLACK = 10
"""How many times the test patients that follow from a site's plan its table may hold: noise, and a public number that
is not up to date. Otherwise one table could be all of the pooled figures."""


@dataclass(frozen=True, kw_only=True)
class Released:
    """What a site let out of how well the model does.

    Attributes:
        tables: one a two-class problem; empty for none.
        reason: why there is none.
    """

    tables: tuple[ScoreTable, ...] = ()
    reason: str = ""

    def metrics(self) -> Scores | None:
        """With intervals; None without a table."""
        return table_metrics(self.tables) if self.tables else None

    def to_dict(self) -> dict[str, Any]:
        """As a summary keeps it: anybody can compute the metrics again."""
        return {
            "metrics": self.metrics(),
            "reason": self.reason,
            "table": [table.counts.astype(int).tolist() for table in self.tables] or None,
            "noise_scale": self.tables[0].scale if self.tables else None,
        }


def ask_tables(
    grid: Grid,
    study: Study,
    peers: Iterable[Peer],
    header: Mapping[str, Any],
    groups: Arrays,
    seconds: float,
    *,
    look: bool = False,
) -> dict[str, Released]:
    """Ask each site that announced a table for it; the same request again gives the same table.

    Args:
        grid: Flower's view of the sites.
        study: says what a table costs, and so how noisy it is.
        peers: who may be asked.
        header: of the request.
        groups: the model's shared groups.
        seconds: deadline.
        look: whether it is one on the way.

    Returns:
        By site.
    """
    result = {peer.site: Released(reason=_why_none(peer, look)) for peer in peers}
    able = {peer.node: peer for peer in peers if result[peer.site].reason == NO_ANSWER and peer.node != NO_NODE}
    header = {**header, "look": True} if look else header
    packed = wire.records(groups)
    requests = {node: wire.pack(header, {group: packed[group] for group in peer.groups}) for node, peer in able.items()}
    for answer in ask(grid, wire.EVALUATE, requests, seconds) if requests else ():
        peer = able[answer.node]
        result[peer.site] = _read(study, peer, answer, look)
    return result


def _why_none(peer: Peer, look: bool) -> str:
    """What keeps a site from giving a table, as far as the handshake told; else that it has not answered yet."""
    if not peer.groups or peer.last_round == 0:
        return "the site took part in no round"
    given, why_none = ("looks", "no_looks") if look else ("table", "no_table")
    return NO_ANSWER if peer.plan.get(given) else str(peer.plan.get(why_none, NOT_ASKED))


def _read(study: Study, peer: Peer, answer: Answer, look: bool) -> Released:
    if answer.header["status"] != "ok":
        return Released(reason=str(answer.header.get("text", "")))
    scale = look_scale(study) if look else table_scale(study)
    tables = read_tables(answer.header.get("table"), problems(study), scale)
    if tables is None:
        return Released(reason=UNREADABLE)
    if any(np.abs(table.counts).sum() > SLACK * held_out(study, peer.patients) for table in tables):
        return Released(reason=TOO_MANY)
    return Released(tables=tuple(tables))


def pooled_metrics(released: Iterable[Released]) -> Scores | None:
    """Metrics of all sites' patients together, from the sum of their tables."""
    given = [site.tables for site in released if site.tables]
    return table_metrics(pooled(given)) if given else None


def mean_metrics(released: Iterable[Released]) -> Scores | None:
    """Mean over sites of each metric where it is defined."""
    given = [site.tables for site in released if site.tables]
    return mean_table_metrics(given) if given else None


def worst_site(released: Mapping[str, Released]) -> dict[str, Any]:
    """The site of the lowest AUROC, with its metrics."""
    found = {name: metrics for name, site in released.items() if (metrics := site.metrics()) is not None}
    defined = {name: metrics["auroc"] for name, metrics in found.items() if metrics["auroc"] is not None}
    worst = min(defined, key=lambda name: defined[name], default=None)
    return {"site": worst, **(found[worst] if worst else {})}
