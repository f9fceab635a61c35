"""The round loop: handshake, rounds with quorum and deadline, group-wise aggregation, the last message.

Flower's own strategies need the same keys from all sites, wait for ever and cannot resume; this loop uses its
Grid and Messages only (docs/decisions/0002).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from gapweave.server.aggregators import AGGREGATORS
from gapweave.server.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from gapweave.server.screening import norm, reason_to_reject
from gapweave.shared import wire
from gapweave.shared.config.study import Study
from gapweave.shared.errors import RefusedError, TooFewSites, Unreachable
from gapweave.shared.model import MultimodalModel, groups, shared_groups
from gapweave.shared.rundir import RunDirectory
from gapweave.shared.tensorfile import Arrays

log = logging.getLogger(__name__)

POLL_S = 0.2
"""Seconds between two looks for replies of sites in other processes."""
NO_NODE = 0
"""Node of a site that has not answered this process of the server."""


class Observer(Protocol):
    """Who is told of a run's progress."""

    def prepared(self, peers: dict[str, Peer]) -> None:
        """After the handshake."""
        ...

    def replied(self, number: int, site: str) -> None:
        """After a site's answer of a round."""
        ...

    def round_done(self, number: int, current: Arrays) -> None:
        """After the aggregation of a round."""
        ...


class Silent:
    """An observer that does nothing."""

    def prepared(self, peers: dict[str, Peer]) -> None:
        """Nothing."""

    def replied(self, number: int, site: str) -> None:
        """Nothing."""

    def round_done(self, number: int, current: Arrays) -> None:
        """Nothing."""


@dataclass(kw_only=True)
class Peer:
    """What the server knows of one site.

    Attributes:
        site: its name.
        node: Flower's id of it, in this process of the server.
        status: ok, refused, failed or late.
        reason: the site's fixed text, when it is not ok.
        modalities: that it declares.
        groups: that it sends.
        rounds: that its cap allows.
        plan: its noise, sampling rate and n_hat.
        last_round: the last round that it took part in.
    """

    site: str
    node: int = NO_NODE
    status: str = "ok"
    reason: str = ""
    modalities: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    rounds: int = 0
    plan: dict[str, Any] = field(default_factory=dict)
    last_round: int = 0


@dataclass(kw_only=True)
class Answer:
    """One site's reply: a header with its status, and arrays."""

    node: int
    header: dict[str, Any]
    arrays: Arrays


class RoundLoop:
    """One run of a study.

    Args:
        grid: Flower's view of the sites.
        study: what all sites agree on.
        directory: where the run is written; a checkpoint in it is continued.
        run: our own id of the run, unless a checkpoint has one.
        observer: who is told of progress.
    """

    def __init__(
        self, grid: Grid, study: Study, directory: RunDirectory, run: str, observer: Observer | None = None
    ) -> None:
        self.grid, self.study, self.directory = grid, study, directory
        self.observer = observer or Silent()
        saved = load_checkpoint(directory.checkpoint, study.sha256)
        self.state = saved or Checkpoint(run=run, study=study.sha256, round=0, groups=initial_groups(study))
        self.peers = {name: Peer(**content) for name, content in self.state.peers.items()}
        for group in self.state.groups:
            AGGREGATORS[study.aggregation.of(group)]  # an unknown rule is refused before any site pays for a round
        directory.keep_rounds(self.state.round)

    def run(self) -> dict[str, Peer]:
        """Handshake, all rounds that are left, and the last message.

        Returns:
            The sites, by name.

        Raises:
            TooFewSites: when fewer than the quorum can take part; what was done can be resumed.
            RefusedError: when every site refuses.
            Unreachable: when no site answers.
        """
        self._prepare()
        for number in range(self.state.round + 1, self.study.training.rounds + 1):
            self._round(number)
        self._finish()
        return self.peers

    def _prepare(self) -> None:
        # Sites reserve budget under the run's id: it must outlive a crash in the handshake, or that budget is lost.
        self._save()
        header = {"run": self.state.run, "study": self.study.canonical()}
        nodes = self._wait_for_nodes()
        for peer in self.peers.values():
            # Of an earlier process of the server: its node may be another site's by now.
            peer.node, peer.status, peer.reason = NO_NODE, "late", "did not answer the handshake"
        for answer in self._ask(wire.PREPARE, {node: wire.pack(header, {}) for node in nodes}):
            self._register(answer)
        if not self.peers:
            raise Unreachable(
                f"none of {len(nodes)} sites answered",
                remedy="Look at the sites' logs with `gapweave site status`",
            )
        self._save()
        self.observer.prepared(self.peers)
        active = self._active()
        if not active and all(peer.status == "refused" for peer in self.peers.values()):
            raise RefusedError("every site refused the study", remedy="; ".join(self._reasons()))
        if self.state.round < self.study.training.rounds:
            self._require_quorum(len(active), "can take part")

    def _wait_for_nodes(self) -> list[int]:
        """Nodes that are there, as soon as they are enough for the quorum, or at the deadline."""
        deadline = time.monotonic() + self.study.aggregation.deadline_s
        while True:
            nodes = sorted(self.grid.get_node_ids())
            if len(nodes) >= self.study.aggregation.quorum or time.monotonic() > deadline:
                return nodes
            time.sleep(POLL_S)

    def _register(self, answer: Answer) -> None:
        header = answer.header if _well_formed(answer.header) else _malformed(answer.header)
        name = str(header.get("site") or f"node-{answer.node}")
        known = self.peers.get(name)
        if known is not None and known.node != NO_NODE:
            header = {"status": "failed", "text": f"another site has the name {name!r}"}
            name, known = f"{name}, node-{answer.node}", None
        fields = {key: header[key] for key in ("modalities", "groups", "rounds", "plan") if key in header}
        peer = Peer(site=name, node=answer.node, status=header["status"], reason=header.get("text", ""), **fields)
        if known is not None:
            peer.last_round = known.last_round
        foreign = set(peer.groups) - self.state.groups.keys()
        if foreign:
            peer.status, peer.reason = (
                "failed",
                f"declares groups that the study does not share: {sorted(foreign)}",
            )
        self.peers[name] = peer

    def _active(self) -> list[Peer]:
        return [peer for _, peer in sorted(self.peers.items()) if peer.status == "ok" and peer.groups]

    def _reasons(self) -> list[str]:
        return [f"{peer.site}: {peer.reason}" for peer in self.peers.values() if peer.reason]

    def _require_quorum(self, count: int, what: str) -> None:
        quorum = self.study.aggregation.quorum
        if count < quorum:
            reasons = "; ".join(self._reasons()) or "none gave a reason"
            raise TooFewSites(
                f"{count} sites {what}, the quorum is {quorum} ({reasons})",
                where="study:aggregation.quorum",
                remedy="Mend the sites and resume the run, or plan with a smaller quorum",
            )

    def _round(self, number: int) -> None:
        start = time.monotonic()
        active = self._active()
        self._require_quorum(len(active), f"are left for round {number}")
        header = {"run": self.state.run, "study": self.study.sha256, "round": number}
        requests = {}
        for peer in active:
            requests[peer.node] = wire.pack(header, {group: self.state.groups[group] for group in peer.groups})
        down = sum(wire.size({group: self.state.groups[group] for group in peer.groups}) for peer in active)
        by_node = {peer.node: peer for peer in active}
        combine = GroupAggregation(self.study, self.state.groups)
        answered = {}
        for answer in self._ask(wire.TRAIN, requests):
            peer = by_node.pop(answer.node)
            answered[peer.site] = self._take(number, peer, answer, combine)
            self.observer.replied(number, peer.site)
        for peer in by_node.values():
            answered[peer.site] = {"status": "late", "reason": "no answer before the deadline"}
        taken = sum(site["status"] == "ok" for site in answered.values())
        self._require_quorum(taken, f"answered in round {number}")
        current, log_lines = combine.finish()
        seconds = time.monotonic() - start
        self.state = Checkpoint(
            run=self.state.run,
            study=self.state.study,
            round=number,
            groups=current,
            bytes_up=self.state.bytes_up + combine.bytes,
            bytes_down=self.state.bytes_down + down,
            seconds=self.state.seconds + seconds,
        )
        line = {
            "round": number,
            "sites": dict(sorted(answered.items())),
            "groups": log_lines,
            "seconds": round(seconds, 4),
            "bytes_up": combine.bytes,
            "bytes_down": down,
        }
        self.directory.write_round(line)
        self._save()
        self.observer.round_done(number, current)

    def _take(self, number: int, peer: Peer, answer: Answer, combine: GroupAggregation) -> dict[str, str]:
        """Take one site's answer; what is wrong with it is said, and the round goes on without it."""
        status = answer.header["status"]
        if status != "ok":
            reason = str(answer.header.get("text", ""))
            # A refusal is final: budgets do not grow during a run. A failure may pass.
            if status == "refused":
                peer.status, peer.reason = "refused", reason
            return {"status": status, "reason": reason}
        if answer.arrays.keys() != set(peer.groups):
            return {"status": "failed", "reason": "other parameter groups than were asked for"}
        peer.last_round = number
        combine.add(peer.site, answer.arrays)
        return {"status": "ok"}

    def _finish(self) -> None:
        """Bring the final shared groups to every site that took part, and keep the model."""
        header = {"run": self.state.run, "study": self.study.sha256, "round": self.state.round}
        took_part = [peer for peer in self.peers.values() if peer.groups and peer.last_round > 0]
        by_node = {peer.node: peer for peer in took_part if peer.node != NO_NODE}
        requests = {
            node: wire.pack(header, {group: self.state.groups[group] for group in peer.groups})
            for node, peer in by_node.items()
        }
        for answer in self._ask(wire.FINISH, requests):
            peer = by_node.pop(answer.node)
            if answer.header["status"] != "ok" and peer.status == "ok":
                peer.status, peer.reason = "failed", str(answer.header.get("text", ""))
        for peer in by_node.values():
            peer.status, peer.reason = "late", "did not confirm the final model"
        self._save()

    def _save(self) -> None:
        peers = {name: asdict(peer) for name, peer in self.peers.items()}
        self.state = Checkpoint(**{**self.state.__dict__, "peers": peers})
        save_checkpoint(self.directory.checkpoint, self.state)

    def _ask(self, kind: str, requests: dict[int, RecordDict]) -> Iterator[Answer]:
        """Send to each node and give answers as they come, until all are in or the deadline passes.

        A reply is matched by the message that it answers: error replies of dead nodes carry another id.
        """
        seconds = self.study.aggregation.deadline_s
        messages = [
            Message(content, dst_node_id=node, message_type=kind, ttl=seconds + 60.0, group_id=kind)
            for node, content in requests.items()
        ]
        pending = dict(zip(self.grid.push_messages(messages), requests, strict=True))
        deadline = time.monotonic() + seconds
        while pending and time.monotonic() < deadline:
            replies = list(self.grid.pull_messages(list(pending)))
            for reply in replies:
                node = pending.pop(reply.metadata.reply_to_message_id, None)
                if node is not None:
                    yield _read(node, reply)
            if pending and not replies:
                time.sleep(POLL_S)


def _read(node: int, reply: Message) -> Answer:
    """A reply as status and arrays; what cannot be read is a failed site, not a failed run."""
    if reply.has_error():
        return Answer(
            node=node,
            header={"status": "failed", "text": f"error {reply.error.code} in transport"},
            arrays={},
        )
    try:
        header, arrays = wire.unpack(reply.content)
    except wire.ProtocolError as error:
        return Answer(node=node, header={"status": "failed", "text": str(error)}, arrays={})
    if header.get("status") not in ("ok", "refused", "failed"):
        header = {"status": "failed", "text": "an answer without a status"}
    return Answer(node=node, header=header, arrays=arrays)


def _well_formed(header: dict[str, Any]) -> bool:
    """Whether a handshake's fields have the types of a capability."""
    names = [header.get("modalities", []), header.get("groups", [])]
    return (
        all(isinstance(part, list) and all(isinstance(name, str) for name in part) for part in names)
        and isinstance(header.get("rounds", 0), int)
        and isinstance(header.get("plan", {}), dict)
    )


def _malformed(header: dict[str, Any]) -> dict[str, Any]:
    return {"site": header.get("site"), "status": "failed", "text": "a handshake of another form"}


class GroupAggregation:
    """One round's aggregation, group by group over the sites that hold it.

    Args:
        study: names the rules.
        current: the shared groups before the round.
    """

    def __init__(self, study: Study, current: Arrays) -> None:
        self.bytes = 0
        self._study, self._current = study, current
        self._updates: dict[str, dict[str, Any]] = {}
        self._screened: dict[str, dict[str, str]] = {}

    def add(self, site: str, arrays: Arrays) -> None:
        """Take one site's groups; each is screened on its own."""
        self.bytes += wire.size(arrays)
        for group, update in arrays.items():
            reason = reason_to_reject(update, self._current[group])
            if reason is not None:
                self._screened.setdefault(group, {})[site] = reason
            else:
                self._updates.setdefault(group, {})[site] = update

    def finish(self) -> tuple[Arrays, dict[str, Any]]:
        """The groups after the round, and a log line a group."""
        result, lines = dict(self._current), {}
        for group in sorted(self._updates.keys() | self._screened.keys()):
            updates = dict(sorted(self._updates.get(group, {}).items()))
            rule = self._study.aggregation.of(group)
            line: dict[str, Any] = {
                "rule": rule,
                "holders": list(updates),
                "norms": {site: norm(update) for site, update in updates.items()},
                "screened": self._screened.get(group, {}),
            }
            lines[group] = line
            try:
                result[group] = self._combine(group, rule, updates)
            except TooFewSites as error:
                line["left_alone"] = error.what
        return result, lines

    def _combine(self, group: str, rule: str, updates: dict[str, Any]) -> dict[str, Any]:
        if self._study.aggregation.strict and len(updates) < 3:
            raise TooFewSites(f"{len(updates)} holders cannot protect each other, and the study is strict")
        accumulator = AGGREGATORS[rule].start(group, len(updates))
        for update in updates.values():
            accumulator.add(update)
        change = accumulator.finish()
        return {name: value + change[name] for name, value in self._current[group].items()}


def initial_groups(study: Study) -> Arrays:
    """The public initial values of every group that the study shares."""
    model = MultimodalModel(study, study.order)
    all_groups = groups(model)
    return {
        group: {name: tensor.numpy().copy() for name, tensor in all_groups[group].items()}
        for group in shared_groups(study, all_groups)
    }
