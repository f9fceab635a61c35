"""Server optimisers: what is done with a round's aggregate. All of them are post-processing and cost no privacy.

Also for a network that is trained alone: it is compared with the federated one, and so must be trained as well.

Reference: Hsu et al. 2019 (arXiv 1909.06335) for momentum; Reddi et al. 2021 (arXiv 2003.00295), algorithm 2, for
Adagrad, Adam and Yogi, without bias correction as there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

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
        change = self._change(group, aggregate)
        return _apart(change.astype(np.float32), aggregate)

    def _change(self, group: str, aggregate: Mapping[str, NDArray[Any]]) -> Floats:
        """Of the group's numbers in one row: a few operations a group, and not a few for each of its tensors."""
        settings, kind = self._settings, self._settings.server_optimizer
        decay, rate = settings.server_momentum, settings.server_lr
        value = _joined(aggregate)
        share = 1.0 if kind == "momentum" else 1 - decay
        first = decay * self._moment("first", group, aggregate) + share * value
        change: Floats = rate * self._keep("first", group, aggregate, first)
        if kind != "momentum":
            before = self._moment("second", group, aggregate)
            second = self._keep("second", group, aggregate, SECOND[kind](before, value**2, settings.server_beta2))
            change = change / (np.sqrt(second) + settings.server_floor)
        return change

    def _moment(self, which: str, group: str, like: Mapping[str, NDArray[Any]]) -> Floats:
        stored = self.moments.get(which, {}).get(group)
        return _joined(stored) if stored else np.zeros(sum(value.size for value in like.values()))

    def _keep(self, which: str, group: str, like: Mapping[str, NDArray[Any]], value: Floats) -> Floats:
        """Keep a moment as a checkpoint does: a resumed run goes on with the very same numbers."""
        kept = np.asarray(value, np.float32)
        self.moments.setdefault(which, {})[group] = _apart(kept, like)
        return kept.astype(np.float64)


def _joined(part: Mapping[str, NDArray[Any]]) -> Floats:
    """The tensors of a group in one row, by name."""
    return np.concatenate([part[name].ravel() for name in sorted(part)]).astype(np.float64)


def _apart(row: NDArray[np.float32], like: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
    """A row of `_joined` as tensors again."""
    names = sorted(like)
    ends = np.cumsum([like[name].size for name in names])
    parts = np.split(row, ends[:-1])
    return {name: values.reshape(like[name].shape) for name, values in zip(names, parts, strict=True)}
