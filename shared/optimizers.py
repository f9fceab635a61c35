"""Server optimisers: what is done with a round's aggregate. All of them are post-processing and cost no privacy.

Also for a network that is trained alone: it is compared with the federated one, and so must be trained as well.

Reference: Hsu et al. 2019 (arXiv 1909.06335) for momentum; Reddi et al. 2021 (arXiv 2003.00295), algorithm 2, for
Adagrad, Adam and Yogi, without bias correction as there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from gapweave.shared.config.sharing import Aggregation
from gapweave.shared.tensorfile import Arrays, flat, shaped

Floats = NDArray[np.float64]
Shapes = Mapping[str, tuple[int, ...]]

SECOND: dict[str, Callable[[Floats, Floats, float], Floats]] = {
    "adagrad": lambda v, square, beta: v + square,
    "adam": lambda v, square, beta: beta * v + (1 - beta) * square,
    "yogi": lambda v, square, beta: v - (1 - beta) * square * np.sign(v - square),
}
"""How the second moment takes a round's squared change."""


class ServerOptimizer:
    """From a group's aggregate to its change.

    Args:
        settings: of the study.
        moments: `first` and `second` moments by group, continued from a checkpoint.
    """

    def __init__(self, settings: Aggregation, moments: dict[str, Arrays] | None = None) -> None:
        self._settings = settings
        self.moments: dict[str, Arrays] = moments or {}

    def step(self, group: str, aggregate: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        """The change of one group, whose moments move on; without an optimiser, the aggregate itself."""
        kind, rate = self._settings.server_optimizer, self._settings.server_lr
        if kind == "none":
            return aggregate if rate == 1 else {name: np.float32(rate) * value for name, value in aggregate.items()}
        shapes = {name: value.shape for name, value in aggregate.items()}
        return shaped(self._change(group, flat(aggregate), shapes), shapes)

    def _change(self, group: str, aggregate: NDArray[np.float32], shapes: Shapes) -> NDArray[np.float32]:
        """Of the group's numbers in one row: a few operations a group, and not a few for each of its tensors."""
        settings, kind = self._settings, self._settings.server_optimizer
        decay, rate, value = settings.server_momentum, settings.server_lr, aggregate.astype(np.float64)
        share = 1.0 if kind == "momentum" else 1 - decay
        first = decay * self._moment("first", group, shapes) + share * value
        change = rate * self._keep("first", group, first, shapes)
        if kind != "momentum":
            before = self._moment("second", group, shapes)
            second = self._keep("second", group, SECOND[kind](before, value**2, settings.server_beta2), shapes)
            change = change / (np.sqrt(second) + settings.server_floor)
        return change.astype(np.float32)

    def _moment(self, which: str, group: str, shapes: Shapes) -> Floats:
        stored = self.moments.get(which, {}).get(group)
        if stored is None:
            return np.zeros(sum(map(math.prod, shapes.values())))
        # A checkpoint gives them in another order than the model.
        return flat({name: stored[name] for name in shapes}).astype(np.float64)

    def _keep(self, which: str, group: str, value: Floats, shapes: Shapes) -> Floats:
        """Keep a moment as a checkpoint does: a resumed run goes on with the very same numbers."""
        kept = np.asarray(value, np.float32)
        self.moments.setdefault(which, {})[group] = shaped(kept, shapes)
        return kept.astype(np.float64)
