"""The round loop: handshake, rounds with quorum and deadline, group-wise aggregation, the last message.

Flower's own strategies need the same keys from all sites, wait for ever and cannot resume; this loop uses its
Grid and Messages only (docs/decisions/0002).
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from flwr.serverapp import Grid

from gapweave.server.aggregation import GroupAggregation, initial_groups
from gapweave.server.agreement import Agreement
from gapweave.server.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from gapweave.server.evaluation import Released, ask_tables
from gapweave.server.handshake import malformed, unfit, well_formed
from gapweave.server.history import History, decay_of
from gapweave.server.mail import POLL_S, Answer, ask
from gapweave.server.peers import NO_NODE, Peer
from gapweave.server.rules import left_alone, resolve, rule_for
from gapweave.server.sampling import sampled
from gapweave.server.scaffold import Variates
from gapweave.server.screening import noise_sd
from gapweave.server.shrinkage import shrunk
from gapweave.server.stopping import EarlyStop, seen_of
from gapweave.shared import wire
from gapweave.shared.config.study import Study
from gapweave.shared.errors import DataError, RefusedError, TooFewSites, Unreachable
from gapweave.shared.late import add_late, late_mean
from gapweave.shared.messages import as_corrections
from gapweave.shared.optimizers import ServerOptimizer
from gapweave.shared.rundir import RunDirectory
from gapweave.shared.schemes import Moment, build_scheme
from gapweave.shared.tensorfile import Arrays, size


class Observer:
    """Who is told of a run's progress; override what you want to hear."""

    def prepared(self, peers: dict[str, Peer]) -> None:
        """The handshake is over."""

    def starting(self, number: int, sent: int) -> None:
        """A round begins, whose messages to sites hold so many bytes; what is raised here ends the run before it."""

    def replied(self, number: int, site: str) -> None:
        """A site answered in a round."""

    def round_done(self, number: int, current: Arrays) -> None:
        """A round was aggregated."""

    def exact_aurocs(self, current: Arrays) -> dict[str, float | None]:
        """How well the model does by site, where whoever watches may know: simulations without privacy."""
        return {}


class RoundLoop:
    """One run of a study.

    Args:
        grid: Flower's view of the sites.
        study: what all sites agree on.
        directory: where the run is written; a checkpoint in it is continued.
        run: our own id of the run, unless a checkpoint has one.
        observer: who is told of progress.
        deadline_s: seconds that a round waits, in place of the study's.
        names: by which name a node was let in, where somebody keeps that.
    """

    def __init__(
        self,
        grid: Grid,
        study: Study,
        directory: RunDirectory,
        run: str,
        observer: Observer | None = None,
        deadline_s: float | None = None,
        names: Callable[[int], str | None] | None = None,
    ) -> None:
        self._names = names
        self.grid, self.study, self.directory = grid, study, directory
        self.observer = observer or Observer()
        self.deadline_s = study.aggregation.deadline_s if deadline_s is None else deadline_s
        saved = load_checkpoint(directory.checkpoint, study.sha256)
        if saved is None and any(directory.rounds()):
            raise DataError(
                "rounds were done, and their checkpoint is gone",
                where=str(directory.checkpoint),
                remedy="Restore it; a new run would begin anew and charge the sites again",
            )
        self.state = saved or Checkpoint(run=run, study=study.sha256, round=0, groups=initial_groups(study))
        self.optimizer = ServerOptimizer(study.aggregation, self.state.moments)
        self.history = History(decay_of(study), self.state.history, self.state.counts)
        self.variates = Variates(study, self.state.variates, self.state.common)
        self.peers = {name: Peer(**content) for name, content in self.state.peers.items()}
        self.stopping = EarlyStop(study.training, self.state.looks)
        self.released: dict[str, Released] = {}
        self._greeted: set[int] = set()
        for group in self.state.groups:
            # An unknown rule is refused before any site pays for a round.
            resolve(rule_for(study.aggregation.of(group), 1))
        directory.keep_rounds(self.state.round)

    def run(self) -> dict[str, Peer]:
        """Handshake, the rounds that are left, looks at scores on the way, the tables of scores, and the last message.

        Returns:
            The sites, by name.

        Raises:
            TooFewSites: when fewer than the quorum can take part; what was done can be resumed.
            RefusedError: when every site refuses.
            Unreachable: when no site answers.
        """
        self._prepare()
        if not self._goes_on:
            self._wait_for_who_trained()
        self._look()
        while self._goes_on:
            self._welcome()
            self._round(self.state.round + 1)
            self._look()
        self._evaluate()
        self._finish()
        return self.peers

    @property
    def _goes_on(self) -> bool:
        """Whether a round is left, and nothing says that it would be in vain."""
        return self.state.round < self.study.training.rounds and not self.stopping.reached

    def _prepare(self) -> None:
        # Sites reserve budget under the run's id: it must outlive a crash in the handshake, or that budget is lost.
        self._save()
        nodes = self._wait_for_nodes()
        self._greeted = set(nodes)
        requests = {node: wire.pack(self._handshake(node), {}) for node in nodes}
        for peer in self.peers.values():
            # Of an earlier process of the server: its node may be another site's by now.
            peer.node, peer.status, peer.reason = NO_NODE, "late", "did not answer the handshake"
        for answer in ask(self.grid, wire.PREPARE, requests, self.deadline_s):
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
            raise RefusedError("every site refused the study", remedy=_listed(self._reasons()))
        if self._goes_on:
            self._require_quorum(len(active), "can take part")
            self._require_work(active)

    def _require_work(self, active: list[Peer]) -> None:
        """Refuse a run that would leave every group alone in every round, before a site pays for one.

        Raises:
            TooFewSites: naming a group; sites that come later may hold it.
        """
        held = Counter(group for peer in active for group in peer.groups)
        alone = left_alone(self.study.aggregation, held)
        if alone.keys() == held.keys():
            raise next(iter(alone.values()))

    def _welcome(self) -> None:
        """Let in who came after the handshake: a site may join at any round, and its groups count from then on.

        Each node is asked once: one that does not answer would hold up every round.
        """
        new = [node for node in sorted(self.grid.get_node_ids()) if node not in self._greeted]
        if not new:
            return
        self._greeted.update(new)
        requests = {node: wire.pack(self._handshake(node), {}) for node in new}
        for answer in ask(self.grid, wire.PREPARE, requests, self.deadline_s):
            self._register(answer)
        self._save()

    def _wait_for_who_trained(self) -> None:
        """Before the last message of a resumed run: who is not there in time never gets the model that it paid for.

        They come back one by one when a hub starts again; in one process nobody else will come.
        """
        deadline = time.monotonic() + (0 if math.isinf(self.deadline_s) else self.deadline_s)
        while any(peer.last_round and peer.node == NO_NODE for peer in self.peers.values()):
            if time.monotonic() > deadline:
                return
            time.sleep(POLL_S)
            self._welcome()

    def _handshake(self, node: int) -> dict[str, Any]:
        """The study, and to a site that was heard before, where its ledger stood: it must not have lost entries."""
        remembered = (peer.ledger for peer in self.peers.values() if peer.node == node and peer.ledger)
        return {"run": self.state.run, "study": self.study.canonical(), "echo": next(remembered, None)}

    def _wait_for_nodes(self) -> list[int]:
        """Nodes that are there, as soon as they are enough for the quorum, or at the deadline."""
        deadline = time.monotonic() + self.deadline_s
        while True:
            nodes = sorted(self.grid.get_node_ids())
            if len(nodes) >= self.study.aggregation.quorum or time.monotonic() > deadline:
                return nodes
            time.sleep(POLL_S)

    def _register(self, answer: Answer) -> None:
        header = answer.header if well_formed(answer.header) else malformed(answer.header)
        given = self._names(answer.node) if self._names else None
        name = str(header.get("site") or given or f"node-{answer.node}")
        if self._names and name != given:
            # A site may answer for itself only, whatever it calls itself.
            name = given or f"node-{answer.node}"
            header = {"status": "failed", "text": f"was let in as {name!r}, and its site file has another name"}
        known = self.peers.get(name)
        if known is not None and known.node in self.grid.get_node_ids():
            self._greeted.discard(answer.node)  # a site that started anew comes in when its old node is gone
            header = {"status": "failed", "text": f"another site has the name {name!r}"}
            name, known = f"{name}, node-{answer.node}", None
        fields = {key: header[key] for key in ("modalities", "groups", "rounds", "plan", "ledger") if key in header}
        peer = Peer(site=name, node=answer.node, status=header["status"], reason=header.get("text", ""), **fields)
        if known is not None:
            peer.last_round, peer.agreement = known.last_round, known.agreement
            peer.ledger = peer.ledger or known.ledger  # a site that refuses because of it does not send another
        if reason := unfit(self.study, self.state.groups, peer):
            # What it declared is nothing to go by, also where it took part before.
            peer = replace(peer, status="failed", reason=reason, modalities=[], groups=[], plan={})
        self.peers[name] = peer
        self.peers.pop(f"{name}, node-{answer.node}", None)  # as which it came while its old node was there

    def _active(self) -> list[Peer]:
        return [peer for _, peer in sorted(self.peers.items()) if peer.status == "ok" and peer.groups]

    def _reasons(self) -> dict[str, str]:
        return {peer.site: peer.reason for peer in self.peers.values() if peer.reason}

    def _require_quorum(self, count: int, what: str, said: Mapping[str, str] | None = None) -> None:
        quorum = self.study.aggregation.quorum
        if count < quorum:
            reasons = _listed(said or self._reasons()) or "none gave a reason"
            raise TooFewSites(
                f"{count} sites {what}, the quorum is {quorum} ({reasons})",
                where="study:aggregation.quorum",
                remedy="Mend the sites and resume the run, or plan with a smaller quorum",
            )

    def _round(self, number: int) -> None:
        start = time.monotonic()
        active = self._active()
        self._require_quorum(len(active), f"are left for round {number}")
        everybody, active = active, sampled(self.study, number, active)
        corrections = self.variates.corrections(active)
        header = {"run": self.state.run, "study": self.study.sha256, "round": number}
        packed = wire.records(self.state.groups)
        requests, down = {}, 0
        for peer in active:
            correction = as_corrections(corrections.get(peer.site, {}))
            requests[peer.node] = wire.pack(header, {**{group: packed[group] for group in peer.groups}, **correction})
            down += size({group: self.state.groups[group] for group in peer.groups}) + size(correction)
        self.observer.starting(number, down)
        by_node = {peer.node: peer for peer in active}
        so_far = {name: Agreement.read(peer.agreement) for name, peer in self.peers.items()}
        combine = GroupAggregation(self.study, self.state.groups, self.optimizer, so_far, self.history, self.variates)
        answered: dict[str, dict[str, Any]] = {}
        for answer in ask(self.grid, wire.TRAIN, requests, self.deadline_s):
            peer = by_node.pop(answer.node)
            answered[peer.site] = self._take(number, peer, answer, combine)
            self.observer.replied(number, peer.site)
        for peer in by_node.values():
            answered[peer.site] = {"status": "late", "reason": "no answer before the deadline"}
        taken = sum(site["status"] == "ok" for site in answered.values())
        said = {site: it["reason"] for site, it in answered.items() if it.get("reason")}
        self._require_quorum(taken, f"answered in round {number}", said)
        # A site that sends no numbers is as good as silent: what diverged would cost budgets to the end. Whom a rule or
        # the test over rounds leaves out has answered: else one who lies could end a run that asks for all.
        self._require_quorum(
            len(combine.usable), f"sent what can be used in round {number}", {**combine.broken, **said}
        )
        current, log_lines = combine.finish()
        self.variates.settle(everybody)
        for name, agreement in combine.agreements.items():
            self.peers[name].agreement = asdict(agreement)
            if agreement.count and name in answered:
                answered[name]["agreement"] = round(agreement.score, 2)
        seconds = time.monotonic() - start
        self.state = replace(
            self.state,
            round=number,
            groups=current,
            moments=self.optimizer.moments,
            history=self.history.sums,
            counts=self.history.counts,
            variates=self.variates.kept,
            common=self.variates.common,
            late=add_late(self.study, number, self.state.late, current),
            noise={group: [*self.state.noise.get(group, []), value] for group, value in combine.noise.items()},
            bytes_up=self.state.bytes_up + combine.bytes,
            bytes_down=self.state.bytes_down + down,
            seconds=self.state.seconds + seconds,
        )
        line = {
            "round": number,
            **build_scheme(self.study).choices(Moment(number, self.study.training.rounds)),
            "sites": dict(sorted(answered.items())),
            "groups": log_lines,
            "seconds": round(seconds, 4),
            "bytes_up": combine.bytes,
            "bytes_down": down,
        }
        self.directory.write_round(line)
        self.observer.round_done(number, current)
        self._save()

    def _take(self, number: int, peer: Peer, answer: Answer, combine: GroupAggregation) -> dict[str, Any]:
        """Take one site's answer; what is wrong with it is said, and the round goes on without it."""
        status = answer.header["status"]
        if status != "ok":
            reason = str(answer.header.get("text", ""))
            # A refusal is final: budgets do not grow during a run. A failure may pass, unless the data cannot be used.
            if status == "refused" or peer.gives_up(answer.header.get("error")):
                peer.status, peer.reason = status, reason
            return {"status": status, "reason": reason}
        if answer.header.get("round") != number:
            return {"status": "failed", "reason": "an answer for another round"}
        if answer.arrays.keys() != set(peer.groups):
            return {"status": "failed", "reason": "other parameter groups than were asked for"}
        peer.last_round, peer.failures = number, 0
        peer.remember(answer.header.get("ledger"))
        combine.add(peer.site, answer.arrays, peer.patients, noise_sd(self.study, peer.plan))
        return {"status": "ok"}

    @property
    def final(self) -> Arrays:
        """The shared groups that the run ends with: the last round's, or the average of late rounds; perhaps shrunk."""
        return self._ending[0]

    @property
    def _ending(self) -> tuple[Arrays, float]:
        """The final groups, and the share that is kept of what was learnt."""
        reached = late_mean(self.study, self.state.late) or self.state.groups
        if not self.study.aggregation.shrink:
            return reached, 1.0
        return shrunk(self.study, initial_groups(self.study), reached, self.state.noise)

    def _look(self) -> None:
        """Look at the scores after the last round, where the study says so; also where a crash left that out."""
        number = self.state.round
        if not self.stopping.due(number):
            return
        if self.study.privacy.enabled:
            seen = seen_of(self._ask_tables(self._active(), self.state.groups, look=True))
        else:
            seen = self.observer.exact_aurocs(self.state.groups), {}
        look = self.stopping.add(number, *seen)
        self.directory.add_to_round(number, {"look": look})
        self.state = replace(self.state, looks=self.stopping.looks)
        self._save()

    def _evaluate(self) -> None:
        """Ask how well the final groups do, before the last message: it ends the run at the sites."""
        final, kept = self._ending
        if self.study.aggregation.shrink:
            self.directory.add_to_round(self.state.round, {"kept": round(kept, 4)})
        self.released = self._ask_tables(list(self.peers.values()), final, look=False)

    def _ask_tables(self, peers: list[Peer], groups: Arrays, *, look: bool) -> dict[str, Released]:
        header = {"run": self.state.run, "study": self.study.sha256, "round": self.state.round}
        return ask_tables(self.grid, self.study, peers, header, groups, self.deadline_s, look=look)

    def _finish(self) -> None:
        """Bring the final shared groups to every site that took part, and keep the model."""
        header = {"run": self.state.run, "study": self.study.sha256, "round": self.state.round}
        took_part = [peer for peer in self.peers.values() if peer.groups and peer.last_round > 0]
        by_node = {peer.node: peer for peer in took_part if peer.node != NO_NODE}
        final = wire.records(self.final)
        requests = {
            node: wire.pack(header, {group: final[group] for group in peer.groups}) for node, peer in by_node.items()
        }
        for answer in ask(self.grid, wire.FINISH, requests, self.deadline_s):
            peer = by_node.pop(answer.node)
            if answer.header["status"] != "ok" and peer.status == "ok":
                peer.status, peer.reason = "failed", str(answer.header.get("text", ""))
        for peer in by_node.values():
            peer.status, peer.reason = "late", "did not confirm the final model"
        self._save()

    def _save(self) -> None:
        # Not `asdict`, which copies what is written to disk at once, in depth.
        self.state = replace(self.state, peers={name: dict(vars(peer)) for name, peer in self.peers.items()})
        save_checkpoint(self.directory.checkpoint, self.state)


def _listed(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{site}: {reason}" for site, reason in reasons.items())
