"""Bad sites of a simulation: what they do to their labels, or send in place of their updates.

No deployed site can do this by a study: `submit` refuses one with a simulation block. Bad sites know all honest updates
of a round, act together, and some know the rule that the server uses; their own scores are not counted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from flwr.app import Message
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from gapweave.server.aggregators import Update, combine
from gapweave.server.history import History, decay_of
from gapweave.server.rules import bad_sites, resolve, rule_for
from gapweave.server.screening import noise_sd
from gapweave.shared import wire
from gapweave.shared.config import Study
from gapweave.shared.config.sharing import AnyRule
from gapweave.shared.config.simulation import UPDATE_ATTACKS
from gapweave.shared.config.study import Task
from gapweave.shared.schema import Batch
from gapweave.shared.tensorfile import Arrays, flat, shaped
from gapweave.sites.simulate.grid import FIRST_NODE, InlineGrid

Rows = NDArray[np.float32]

KNOWING = ("alie", "min_max", "adaptive")
"""Attacks that search, among what the server's rule will see: means over rounds, where it keeps a history."""
STRENGTHS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Lengths among which an attacker that knows the rule searches, in units of its direction."""
HALVINGS = 30


def bad_names(study: Study, names: Iterable[str]) -> frozenset[str]:
    """The bad sites: drawn by the study's seed and the sites' names."""
    if study.simulation.attack == "none":
        return frozenset()
    drawn = sorted(names, key=lambda name: hashlib.sha256(f"{study.seed}/bad/{name}".encode()).digest())
    return frozenset(drawn[: study.simulation.bad_sites])


def mislabelled(batch: Batch, task: Task, attack: str) -> Batch:
    """A bad site's training records.

    Args:
        batch: as they are.
        task: says what a label is.
        attack: `label_flip`: every label is another one; `swap_labels`: two classes, or labels, change places.
    """
    target = batch.target
    swapped = [1, 0, *range(2, target.shape[1])]
    if task.kind == "multiclass":
        others = [*range(1, target.shape[1]), 0]
        return replace(batch, target=target[:, others if attack == "label_flip" else swapped])
    if task.kind == "multilabel" and attack == "swap_labels" and target.shape[1] > 1:
        return replace(batch, target=target[:, swapped], label_mask=batch.label_mask[:, swapped])
    return replace(batch, target=1 - target)


def lie(
    attack: str,
    own: Rows,
    honest: Rows,
    before: Rows,
    rule: AnyRule,
    bad: int,
    noised: bool = False,
    noise: Sequence[float] | None = None,
) -> Rows:
    """What each bad site sends of one parameter group.

    Args:
        attack: of `UPDATE_ATTACKS`.
        own: [d], what a bad site would send if it were honest.
        honest: [h, d], the honest sites' updates of the round.
        before: [d], its own of the round before.
        rule: the server's, for this group.
        bad: number of bad sites that hold the group.
        noised: whether updates hold noise, so that the server looks for a site that pulls against the others over the
            rounds: `adaptive` then never does.
        noise: [h + bad] expected squared lengths of the noise that the server takes updates to hold, bad sites' last;
            None for no noise.

    Returns:
        [d]

    References: Baruch et al. 2019 (arXiv 1902.06156) for `alie`, whose z is searched since its own is negative for few
        sites; Xie et al. 2019 (arXiv 1903.03936) for `inner_product`; Karimireddy et al. 2022 (arXiv 2006.09365) for
        `mimic`; Shejwalkar and Houmansadr 2021 (NDSS), section IV, for `min_max` and `adaptive`.
    """
    if attack in ("nan", "inf"):
        return np.full_like(own, np.nan if attack == "nan" else np.inf)
    simple = {"sign_flip": -own, "times_100": 100 * own, "zero": 0 * own, "stale": before}
    if attack in simple or not len(honest):
        return simple.get(attack, -own)
    mean, spread = honest.mean(0, dtype=np.float64), honest.std(0, dtype=np.float64)
    if attack == "inner_product":
        found = -mean
    elif attack == "mimic":
        found = honest[0].astype(np.float64)
    elif attack == "min_max":
        found = mean - _longest(honest, mean, spread) * spread
    else:
        directions = [spread] if attack == "alie" else [spread, mean, np.sign(mean) * spread.mean()]
        found = _most_harmful(honest, mean, directions, rule, bad, noise, hidden=noised and attack == "adaptive")
    sent: Rows = found.astype(np.float32)
    return sent


def _longest(honest: Rows, mean: NDArray[np.float64], direction: NDArray[np.float64]) -> float:
    """How far along a direction a point is no farther from any honest update than they are from each other."""

    def farthest(point: NDArray[np.float64]) -> float:
        return float(np.sqrt(((honest - point) ** 2).sum(1).max()))

    reach = max(farthest(row.astype(np.float64)) for row in honest)
    low, high = 0.0, 1e3
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if farthest(mean - middle * direction) <= reach else (low, middle)
    return low


def _most_harmful(
    honest: Rows,
    mean: NDArray[np.float64],
    directions: Sequence[NDArray[np.float64]],
    rule: AnyRule,
    bad: int,
    noise: Sequence[float] | None,
    hidden: bool,
) -> NDArray[np.float64]:
    """The point whose copies move the result of the server's own rule farthest from the honest mean.

    A hidden one is never against that mean.
    """
    sites = len(honest) + bad
    stages, f = resolve(rule_for(rule, sites)), bad_sites(sites, rule)
    best, harm = mean, -1.0
    for direction in directions:
        for strength in STRENGTHS:
            point = mean - strength * direction
            if hidden and point @ mean < 0:
                continue
            rows = np.concatenate([honest, np.tile(point.astype(np.float32), (bad, 1))])
            moved = float(np.linalg.norm(combine(rows, stages, f, noise) - mean))
            best, harm = (point, moved) if moved > harm else (best, harm)
    return best


def wanted(history: History, site: str, group: str, mean: Update) -> Update:
    """The update after which a site's history has this mean."""
    if group not in history.sums.get(site, {}):
        return mean
    before, decay = history.sums[site][group], np.float32(history.decay)
    weight = np.float32((1 - history.decay ** (history.counts[site][group] + 1)) / (1 - history.decay))
    return {name: weight * value - decay * before[name] for name, value in mean.items()}


def disguised(sent: Rows, own: Rows, stated: float) -> Rows:
    """A lie with noise of its own, as long as the honest update would be, or the noise that the site has stated.

    Nobody sees that it lacks its noise.

    Args:
        sent: [d], the lie.
        own: [d], the honest update.
        stated: expected squared length of the noise.
    """
    missing = max(float(own.astype(np.float64) @ own), stated) - float(sent.astype(np.float64) @ sent)
    sd = np.sqrt(max(missing, 0.0) / len(own))
    return sent + np.random.default_rng().normal(0, sd, len(own)).astype(np.float32)


def overstated(plan: Mapping[str, Any]) -> dict[str, Any]:
    """A plan with half the patients, so twice the noise: a rule that corrects for noise then forgives a longer lie."""
    return {**plan, "n_hat": max(1, int(plan["n_hat"]) // 2)}


class HostileGrid(InlineGrid):
    """The inline grid with bad sites, which answer after all others.

    Args:
        client_app: answers every message.
        node_configs: one mapping a site.
        names: of the sites, in the order of the configurations.
        study: names the attack, and the server's rules.
    """

    def __init__(
        self, client_app: ClientApp, node_configs: Sequence[Mapping[str, Any]], names: Sequence[str], study: Study
    ) -> None:
        super().__init__(client_app, node_configs)
        bad = bad_names(study, names)
        self._study, self._attack = study, study.simulation.attack
        self._bad = {FIRST_NODE + at for at, name in enumerate(names) if name in bad}
        self._round = 0
        self._honest: dict[int, Arrays] = {}
        self._before: dict[int, Arrays] = {}
        self._lies: dict[str, Rows] = {}
        self._seen = History(decay_of(study) if self._attack in KNOWING else 0)
        self._sds: dict[int, float] = {}

    def get_node_ids(self) -> list[int]:
        """All nodes; bad ones that are absent are not there."""
        return [node for node in super().get_node_ids() if self._attack != "absent" or node not in self._bad]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Answer honest sites first."""
        queued = [identity for identity in message_ids if identity in self._queue]
        queued.sort(key=lambda identity: self._queue[identity].metadata.dst_node_id in self._bad)
        return super().pull_messages(queued)

    def _answer(self, message: Message) -> Message:
        reply = super()._answer(message)
        if self._attack not in UPDATE_ATTACKS or reply.has_error():
            return reply
        node, kind = message.metadata.dst_node_id, message.metadata.message_type
        header, arrays = wire.unpack(reply.content)
        if kind == wire.PREPARE and "plan" in header:
            if self._disguises and node in self._bad:
                header = {**header, "plan": overstated(header["plan"])}
                reply = Message(wire.pack(header, arrays), reply_to=message)
            self._sds[node] = noise_sd(self._study, header["plan"])
        if kind != wire.TRAIN:
            return reply
        number = wire.unpack(message.content)[0]["round"]
        if number != self._round:
            self._round, self._honest, self._lies = number, {}, {}
        if node not in self._bad:
            self._honest[node] = {group: self._seen.take(str(node), group, part) for group, part in arrays.items()}
            return reply
        before, self._before[node] = self._before.get(node, arrays), arrays
        sent = {group: self._sent(node, group, part, before.get(group, part)) for group, part in arrays.items()}
        return Message(wire.pack({**header}, sent), reply_to=message)

    @property
    def _disguises(self) -> bool:
        return self._attack == "adaptive" and self._study.privacy.enabled

    def _sent(self, node: int, group: str, own: Update, before: Update) -> Update:
        """A bad site's update of a group: bad sites that know the others want the same to be seen."""
        heard = [other for other, part in sorted(self._honest.items()) if group in part]
        honest = [flat(self._honest[other][group]) for other in heard]
        rows = np.stack(honest) if honest else np.empty((0, len(flat(own))), np.float32)
        alone, noised = self._attack in ("sign_flip", "times_100", "stale"), self._study.privacy.enabled
        if alone or group not in self._lies:
            rule, bad = self._study.aggregation.of(group), len(self._bad)
            noise = [self._noise(other, group, rows.shape[1]) for other in [*heard, *[node] * bad]]
            self._lies[group] = lie(self._attack, flat(own), rows, flat(before), rule, bad, noised, noise)
        shapes = {name: value.shape for name, value in own.items()}
        sent = wanted(self._seen, str(node), group, shaped(self._lies[group], shapes))
        if self._disguises:
            stated = self._sds.get(node, 0.0) ** 2 * rows.shape[1]
            sent = shaped(disguised(flat(sent), flat(own), stated), shapes)
        self._seen.take(str(node), group, sent)
        return sent

    def _noise(self, node: int, group: str, numbers: int) -> float:
        """Expected squared length of the noise in what the server's rule sees of a site."""
        return self._sds.get(node, 0.0) ** 2 * numbers * self._seen.noise(str(node), group)
