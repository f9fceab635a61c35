"""Rules that combine one parameter group's updates, over the sites that hold it.

A rule is started for a group and a number of sites, gets one update at a time, and gives the aggregate. It never
clamps its parameters to make a condition go away: it raises `TooFewSites`.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gapweave.shared.registry import Registry

Update = dict[str, NDArray[np.float32]]
"""One site's update of one group: name -> array."""


class Accumulator(Protocol):
    """The aggregation of one group in one round."""

    def add(self, update: Update) -> None:
        """Take one site's update."""
        ...

    def finish(self) -> Update:
        """The aggregate, with the keys, shapes and dtype of the updates."""
        ...


class Aggregator(Protocol):
    """A registered rule."""

    def start(self, group: str, sites: int) -> Accumulator:
        """Begin a group.

        Raises:
            TooFewSites: when the rule's condition does not hold for so few.
        """
        ...


AGGREGATORS: Registry[Aggregator] = Registry("aggregation rule", "gapweave.server.aggregators")


def resolve(rule: str) -> str:
    """The registered rule behind a name in the study: `auto` is the mean.

    Raises:
        UsageError: for a rule that is not installed.
    """
    name = "mean" if rule == "auto" else rule
    AGGREGATORS[name]
    return name
