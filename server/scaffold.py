"""SCAFFOLD: each local step is corrected by how the site's gradients differ from everybody's.

Sites whose patients differ drift apart over many local steps, and the mean of where they end is not where the mean of
their losses is least. Each step of site i goes along g - c_i + c instead: c_i is the mean of the gradients that the
site's last round was made of (option II), c what the group's rule makes of all c_i.

Here the server keeps all variates, and sends each site the one difference c - c_i that it needs. It can: a round of K
steps with learning rate l is -K l (mean gradient + c - c_i), so c_i follows from the update and from what was sent. So
nothing but the update leaves a site, nothing more is charged, a site has no variate to lose or to lie about, and one
whose answer was lost is corrected next time by what the server has of it.

Guarantee: costs no privacy: an update is a function of the noised steps and of what the server sent; a correction is
    added after the noise, where clipping bounds each patient's part whatever the parameters are.
Assumes: plain SGD at the sites: no momentum, no proximal term.
Edge cases: a site without a variate yet, or whose update of the group was screened or is too large for one, gets no
    correction (the paper's first round has none either); a group whose rule cannot work among its variates has none in
    that round.
Reference: Karimireddy et al. 2020 (arXiv 1910.06378), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from gapweave.server.aggregators import Sum, Update
from gapweave.server.peers import Peer
from gapweave.server.rules import begin
from gapweave.server.screening import REPRESENTABLE
from gapweave.shared.config.study import Study
from gapweave.shared.errors import TooFewSites
from gapweave.shared.tensorfile import Arrays


class Variates:
    """The control variates of a run.

    Args:
        study: where it does not ask for them, nothing is kept and nothing sent.
        kept: c_i by site and group, continued from a checkpoint.
        common: c by group, likewise.
    """

    def __init__(self, study: Study, kept: Mapping[str, Arrays] | None = None, common: Arrays | None = None) -> None:
        self._study = study
        self.kept: dict[str, Arrays] = {site: dict(groups) for site, groups in (kept or {}).items()}
        self.common: Arrays = common or {}
        self._sent: dict[str, Arrays] = {}

    def corrections(self, asked: Iterable[Peer]) -> dict[str, Arrays]:
        """What is added to each step of a round, c - c_i by site and group.

        It follows from what a checkpoint keeps and not from who is there: a resumed round asks as it did before, and
        sites give the answers that they have.
        """
        self._sent = {
            peer.site: {
                group: {name: self.common[group][name] - value for name, value in part.items()}
                for group, part in self.kept.get(peer.site, {}).items()
                if group in peer.groups and group in self.common
            }
            for peer in asked
        }
        return self._sent

    def settle(self, active: Iterable[Peer]) -> None:
        """Combine the variates after a round, by each group's own rule over its holders.

        Args:
            active: sites that can take part, also those that the round did not ask.
        """
        holders: dict[str, list[Peer]] = {}
        for peer in active:
            for group in self.kept.get(peer.site, {}):
                holders.setdefault(group, []).append(peer)
        combined = {group: self._combined(group, peers) for group, peers in holders.items()}
        self.common = {group: part for group, part in combined.items() if part is not None}

    def _combined(self, group: str, holders: list[Peer]) -> Update | None:
        aggregation = self._study.aggregation
        try:
            total = begin(aggregation, group, len(holders))
        except TooFewSites:
            return None
        for peer in holders:
            part = self.kept[peer.site][group]
            if isinstance(total, Sum):
                total.add(part, weight=peer.patients if aggregation.weights == "patients" else 1)
            else:
                total.add(part)
        common = total.finish()
        return common if all(np.isfinite(value).all() for value in common.values()) else None

    def take(self, site: str, group: str, update: Update, patients: int) -> None:
        """The mean gradient behind an update that was not screened."""
        training = self._study.training
        if not training.scaffold:
            return
        reach = np.float32(1 / (training.steps_for(patients) * training.lr))
        sent = self._sent.get(site, {}).get(group)
        variate = {
            name: -reach * value if sent is None else -reach * value - sent[name] for name, value in update.items()
        }
        if all(np.abs(value).max(initial=0.0) <= REPRESENTABLE for value in variate.values()):
            self.kept.setdefault(site, {})[group] = variate
        else:
            self.forget(site, group)

    def forget(self, site: str, group: str) -> None:
        """What an update said that was screened after all."""
        self.kept.get(site, {}).pop(group, None)

    def uncorrected(self, group: str, updates: Mapping[str, Update]) -> Mapping[str, Update]:
        """The same updates as the sites' own gradients alone would make them, but for their length and sign.

        What the server itself put in is alike at all sites: compared with it, noise would look like agreement.
        """
        if not self._study.training.scaffold:
            return updates
        return {site: kept for site in updates if (kept := self.kept.get(site, {}).get(group)) is not None}
