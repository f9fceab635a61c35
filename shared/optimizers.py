"""Server optimisers: what is done with a round's aggregate. All of them are post-processing and cost no privacy.

Also for a network that is trained alone: it is compared with the federated one, and so must be trained as well.

Reference: Hsu et al. 2019 (arXiv 1909.06335) for momentum; Reddi et al. 2021 (arXiv 2003.00295), algorithm 2, for
Adagrad, Adam and Yogi, without bias correction as there.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from gapweave.shared.config.sharing import Aggregation
from gapweave.shared.tensorfile import Arrays

Floats = NDArray[np.float64]

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
        return {name: self._change(group, name, value.astype(np.float64)) for name, value in aggregate.items()}

    def _change(self, group: str, name: str, value: Floats) -> NDArray[np.float32]:
        settings, kind = self._settings, self._settings.server_optimizer
        decay, rate = settings.server_momentum, settings.server_lr
        share = 1.0 if kind == "momentum" else 1 - decay
        first = decay * self._moment("first", group, name, value) + share * value
        change = rate * self._keep("first", group, name, first)
        if kind != "momentum":
            before = self._moment("second", group, name, value)
            second = self._keep("second", group, name, SECOND[kind](before, value**2, settings.server_beta2))
            change = change / (np.sqrt(second) + settings.server_floor)
        return change.astype(np.float32)

    def _moment(self, which: str, group: str, name: str, value: Floats) -> Floats:
        stored = self.moments.get(which, {}).get(group, {}).get(name)
        return np.zeros_like(value) if stored is None else stored.astype(np.float64)

    def _keep(self, which: str, group: str, name: str, value: Floats) -> Floats:
        """Keep a moment as a checkpoint does: a resumed run goes on with the very same numbers."""
        kept = np.asarray(value, np.float32)
        self.moments.setdefault(which, {}).setdefault(group, {})[name] = kept
        return kept.astype(np.float64)
