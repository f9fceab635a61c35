"""Which sites a round asks: all, or a draw that anybody can repeat from the study's seed.

The draw is public and no part of a site's privacy accounting: amplification comes from a site's own sampling only.
"""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np

from gapweave.server.peers import Peer
from gapweave.shared.config.study import Study


def sampled(study: Study, number: int, active: list[Peer]) -> list[Peer]:
    """The sites of one round.

    Args:
        study: says how many, and how they are drawn.
        number: of the round.
        active: sites that can take part, by name.

    Returns:
        Some of them, by name.
    """
    count = study.aggregation.sample
    if count is None or count >= len(active):
        return active
    digest = hashlib.sha256(f"{study.seed}/sites/{number}".encode()).digest()
    order = np.random.default_rng(list(digest)).permutation(len(active))
    drawn = [active[at] for at in order]
    chosen = drawn[:count] if study.aggregation.sampling == "random" else _covering(drawn, count)
    return sorted(chosen, key=lambda peer: peer.site)


def _covering(drawn: list[Peer], count: int) -> list[Peer]:
    """One site after another: the first that holds most of what few sites hold and fewer of the chosen do."""
    holders = Counter(group for peer in drawn for group in peer.groups)
    left, chosen = list(drawn), list[Peer]()
    asked: Counter[str] = Counter()
    while len(chosen) < count:
        best = max(left, key=lambda peer: sum(1 / (holders[group] * (1 + asked[group]) ** 2) for group in peer.groups))
        left.remove(best)
        chosen.append(best)
        asked.update(best.groups)
    return chosen
