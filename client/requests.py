"""What a request must be before a site works on it: of an open run, for the next round, with just its groups.

Whether it may be worked on at all is the policy's and the ledger's to say.
"""

from __future__ import annotations

import math

import numpy as np

from gapweave.client.state import Groups
from gapweave.shared.errors import RefusedError
from gapweave.shared.privacy.ledger import LedgerView
from gapweave.shared.tensorfile import Arrays


def check_open(view: LedgerView, run: str) -> None:
    """Refuse to work for a run that got its last message.

    Raises:
        RefusedError: when it did.
    """
    if view.closed(run):
        raise RefusedError("this run is over", where=run, remedy="Start another run")


def check_round(number: int, done: int, planned: int) -> None:
    """Refuse a round that the study does not have, or that was answered before to another request.

    Args:
        number: of the round asked for.
        done: rounds that the site has answered.
        planned: rounds of the study.

    Raises:
        RefusedError: for both.
    """
    if number > planned:
        raise RefusedError(f"round {number} is not in the study", remedy="Plan a study of more rounds")
    if number <= done:
        raise RefusedError(
            f"round {number} was answered before, to another request",
            remedy="Resume the run from its newest checkpoint",
        )


LARGEST = 1000.0
"""Largest parameter that a site takes from a server under privacy; the demo's are 1 at most. Far larger ones are a way
to make the rounding of sums decide what a patient contributes."""


def check_groups(received: Arrays, shared: Groups, largest: float = math.inf) -> None:
    """Refuse anything but exactly the shared groups, all of finite numbers.

    A copy would spread a smaller tensor over a larger one, and one NaN would end the site's private groups.

    Args:
        received: from the server.
        shared: the groups that the site shares, of the shapes that they have.
        largest: magnitude that no number may exceed.

    Raises:
        RefusedError: for others.
    """
    shapes = {(group, name): tuple(value.shape) for group, part in shared.items() for name, value in part.items()}
    asked = {(group, name): value.shape for group, part in received.items() for name, value in part.items()}
    if asked != shapes:
        raise RefusedError(
            "the server sent other parameter groups than the study shares",
            remedy="Both sides must run the same study with the same Gapweave version",
        )
    # Of an array that holds what is no number, the largest is none either.
    tops = [np.abs(value).max(initial=0.0) for part in received.values() for value in part.values()]
    if not np.isfinite(tops).all():
        raise RefusedError(
            "the server sent parameters that are no numbers",
            remedy="Resume the run from a checkpoint before its model diverged",
        )
    if max(tops, default=0.0) > largest:
        raise RefusedError(
            f"the server sent parameters beyond {largest:g}",
            remedy="Start the study again with a smaller learning rate: its model diverged",
        )


def check_same_model(kept: Groups, received: Arrays) -> None:
    """Refuse a model in the place of the one that a run ended with: people predict with it.

    Raises:
        RefusedError: when any number of it differs.
    """
    for group, part in received.items():
        for name, value in part.items():
            if not np.array_equal(kept[group][name], value):
                raise RefusedError("this run ended with another model", remedy="Start another run")
