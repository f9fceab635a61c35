"""Rules that combine one parameter group's updates, over the sites that hold it.

A rule is a chain of stages, `nnm+trimmed_mean` say: all but the last mix updates, the last one combines them. Every
stage reads the updates either through their Gram matrix (who is how far from whom) or column by column, so that a
whole chain needs at most two passes over the updates and memory for one block of columns.

A stage never clamps its parameters to make a condition go away: it raises `TooFewSites`.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from gapweave.shared.config.base import StrictModel
from gapweave.shared.registry import Registry
from gapweave.shared.tensorfile import shaped

Update = dict[str, NDArray[np.float32]]
"""One site's update of one group: name -> array."""

Floats = NDArray[np.float64]
Rows = NDArray[np.float32]

Property = Literal["equal", "permutation", "translation", "breakdown"]
"""What a rule may promise.

equal: what all sites agree on is the result; permutation: the order of sites does not matter; translation: moving every
update moves the result alike; breakdown: `f` sites of any kind leave the result near the others'.
"""


EVERYTHING: frozenset[Property] = frozenset(get_args(Property))


class Accumulator(Protocol):
    """The aggregation of one group in one round."""

    def add(self, update: Update, noise: float = 0.0) -> None:
        """Take one site's update, and the expected squared length of the noise in it; 0 for none, or not known."""
        ...

    def finish(self) -> Update:
        """The aggregate, with the keys, shapes and dtype of the updates."""
        ...


class NoParameters(StrictModel):
    """A stage without parameters."""


class Tolerance(StrictModel):
    """What a stage against bad sites is given."""

    f: int | None = Field(None, ge=1, description="bad sites among a group's holders (default: by their number)")


class Stage:
    """One registered stage of a rule.

    Args:
        parameters: of the class's `Parameters`; None for the defaults.

    Attributes:
        properties: what it promises where it stands alone; the contract suite tests just that.
    """

    Parameters: ClassVar[type[StrictModel]] = Tolerance
    """What a study may give it beside its name."""
    properties: ClassVar[frozenset[Property]] = frozenset()

    def __init__(self, parameters: StrictModel | None = None) -> None:
        self.parameters: Any = parameters or self.Parameters()

    def needs(self, f: int) -> int:
        """The smallest number of sites for which the stage's theorem holds with `f` bad ones."""
        return 2 * f + 1


class Mixer(Stage, ABC):
    """A pre-aggregator: every row that it gives is a weighted mean of updates."""

    def rows(self, n: int) -> int:
        """How many rows it makes of n."""
        return n

    @abstractmethod
    def mix(self, gram: Gram, f: int) -> Floats:
        """Weights [m, n] of m mixed rows."""


class Weigher(Stage, ABC):
    """A rule whose result is a weighted sum of updates, with weights read off their distances."""

    @abstractmethod
    def weigh(self, gram: Gram, f: int) -> Floats:
        """Weights [n]."""


class Columnwise(Stage, ABC):
    """A rule that works on each coordinate by itself, in float32 as the updates come."""

    def choose(self, gram: Gram, f: int) -> NDArray[np.intp] | None:
        """Rows that the columns are read of; None for all."""
        return None

    @abstractmethod
    def combine(self, block: Rows, f: int) -> Rows:
        """[n, b], each row in one piece -> [b]."""


class Gram:
    """Inner products of n updates and of the origin (no change at all), which stands last.

    Args:
        products: [n + 1, n + 1], of vectors moved by one common vector: distances do not see it.
        noise: [n + 1, n + 1], what independent noise is expected to add to the products; None for nothing.
        lot: what random draws are made from: the same for the same updates, in whatever order they came.
    """

    def __init__(self, products: Floats, noise: Floats | None = None, lot: bytes = b"") -> None:
        self.products = products
        self.noise = np.zeros_like(products) if noise is None else noise
        self.lot = lot
        self.n = len(products) - 1

    def distances(self) -> Floats:
        """[n, n] squared distances between updates, less what noise adds to them: below 0 by chance then.

        Without that, who has the fewest patients and so the most noise is the farthest, whatever it says.
        """
        signal = self.products - self.noise
        squares = np.diag(signal)
        between: Floats = (squares[:, None] + squares[None, :] - 2 * signal)[: self.n, : self.n]
        return between if self.noise.any() else np.maximum(between, 0.0)

    def nearest(self) -> NDArray[np.intp]:
        """[n, n] updates from the nearest to the farthest of each, itself first."""
        distances = self.distances()
        np.fill_diagonal(distances, -np.inf)
        return np.argsort(distances, axis=1, kind="stable")

    def norms(self) -> Floats:
        """[n] lengths of the updates."""
        return np.sqrt(self.distances_to(np.zeros(self.n)))

    def distances_to(self, weights: Floats) -> Floats:
        """[n] squared distances of the updates to their weighted sum; the origin takes the rest of the weight.

        Args:
            weights: [n].
        """
        point = np.append(weights, 1 - weights.sum())
        image = self.products @ point
        squared: Floats = np.diag(self.products)[: self.n] - 2 * image[: self.n] + point @ image
        return np.maximum(squared, 0.0)

    def mixed(self, weights: Floats) -> Gram:
        """The Gram matrix of mixed rows.

        Args:
            weights: [m, n], each row of sum 1.
        """
        full = np.zeros((len(weights) + 1, self.n + 1))
        full[:-1, :-1], full[-1, -1] = weights, 1.0
        return Gram(full @ self.products @ full.T, full @ self.noise @ full.T, self.lot)


AGGREGATORS: Registry[Stage] = Registry("aggregation rule", "gapweave.server.aggregators")

BLOCK = 3 << 20
"""Bytes of a block of columns of all updates: more do not fit caches, and fewer cost more calls than work."""
BELIEVED = 4.0
"""Largest squared length of noise, over the median site's, that distances are corrected for: twice the noise, or half
the patients."""
BOUND = np.float32(2)
"""Standard deviations from the median beyond which a number is no nearer to the truth for being kept (0026)."""
NORMAL = np.float32(1.4826)
"""Standard deviation of a normal sample over its median distance from the median (Rousseeuw and Croux 1993)."""
SAMPLED = 4096
"""Coordinates on which the most central update is looked for, and from which lots are drawn."""


class Sum:
    """The mean as a running sum in float64: memory does not grow with the number of sites."""

    def __init__(self) -> None:
        self._weight = 0.0
        self._sum: dict[str, NDArray[np.float64]] = {}

    def add(self, update: Update, noise: float = 0.0, weight: float = 1.0) -> None:
        """Add one update, which counts as so many; its noise is no matter."""
        self._weight += weight
        for name, value in update.items():
            part = value if weight == 1 else weight * value.astype(np.float64)
            if name in self._sum:
                self._sum[name] += part
            else:
                self._sum[name] = part.astype(np.float64)

    def finish(self) -> Update:
        """Divide by the weight of all."""
        # Block by block into float32: no second copy of the sums.
        return {
            name: np.divide(total, self._weight, out=np.empty(total.shape, np.float32), casting="same_kind")
            for name, total in self._sum.items()
        }


class Gathered:
    """A chain over updates that lie in one preallocated array, a row a site.

    Args:
        stages: of the chain.
        sites: number of updates that will come.
        f: bad sites that it is prepared for.
    """

    def __init__(self, stages: tuple[Stage, ...], sites: int, f: int) -> None:
        self._stages, self._sites, self._f = stages, sites, f
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._rows: Rows = np.empty((0, 0), np.float32)
        self._filled = 0
        self._noise: list[float] = []

    def add(self, update: Update, noise: float = 0.0) -> None:
        """Copy one update into its row."""
        self._noise.append(noise)
        if not self._shapes:
            # In the order of names: a checkpoint gives them in another order than a model, and sums would differ.
            self._shapes = {name: update[name].shape for name in sorted(update)}
            self._rows = np.empty((self._sites, sum(value.size for value in update.values())), np.float32)
        at = 0
        for name, shape in self._shapes.items():
            size = math.prod(shape)
            self._rows[self._filled, at : at + size] = update[name].ravel()
            at += size
        self._filled += 1

    def finish(self) -> Update:
        """Run the chain."""
        return shaped(combine(self._rows[: self._filled], self._stages, self._f, self._noise), self._shapes)


def combine(rows: Rows, stages: tuple[Stage, ...], f: int, noise: Sequence[float] | None = None) -> Rows:
    """Run a chain over updates.

    Args:
        rows: [n, d], finite.
        stages: as `rules.resolve` gives them.
        f: bad sites among n.
        noise: [n] expected squared lengths of the noise in them, or None for no noise.

    Returns:
        [d]
    """
    *mixers, last = stages
    sd = math.sqrt(_usual(noise) / rows.shape[1]) if noise is not None else 0.0
    weights: Floats | None = None
    if mixers or not isinstance(last, Columnwise) or type(last).choose is not Columnwise.choose:
        gram = gram_of(rows, noise)
        # Sites come in the order of their values: no tie is broken by who sent first.
        order = np.lexsort((gram.distances().sum(1), gram.norms()))
        weights = np.eye(len(rows))[order]
        gram = gram.mixed(weights)
        for stage in mixers:
            if isinstance(stage, Mixer):
                mixing = stage.mix(gram, f)
                weights, gram = mixing @ weights, gram.mixed(mixing)
        if isinstance(last, Weigher):
            return _weighted(rows, last.weigh(gram, f) @ weights, sd)
        if isinstance(last, Columnwise) and (chosen := last.choose(gram, f)) is not None:
            weights = weights[chosen]
    assert isinstance(last, Columnwise)
    return _by_column(rows, weights, last, f, sd)


def _usual(noise: Sequence[float]) -> float:
    """The median site's noise."""
    return float(np.sort(noise)[(len(noise) - 1) // 2])


def believed(noise: Sequence[float]) -> Floats:
    """[n] of each site's noise as much as is taken off its distances.

    A site states its noise itself, and a lie of that length passes for noise: none is believed to have much more than
    is usual.
    """
    result: Floats = np.minimum(np.asarray(noise, np.float64), BELIEVED * _usual(noise))
    return result


def bounded(block: Rows, sd: float) -> Rows:
    """Each number kept near its median over the sites: as near as noise explains, or as the middle site is.

    Distances bound how long a lie is that passes for noise; whoever knows what harms puts all of that length into a few
    numbers, which no honest site's noise moves so far.

    Args:
        block: [n, b].
        sd: of the usual site's noise in a number.

    Returns:
        [n, b]
    """
    from gapweave.server.selection import mean_of_ranks  # loads a compiler

    ranks = (len(block) - 1) // 2, len(block) // 2 + 1
    middle = mean_of_ranks(block, *ranks)
    spread = BOUND * np.maximum(np.float32(sd), NORMAL * mean_of_ranks(np.abs(block - middle), *ranks))
    result: Rows = np.clip(block, middle - spread, middle + spread)
    return result


def _weighted(rows: Rows, weights: Floats, sd: float) -> Rows:
    """The weighted sum; without noise by one of BLAS' products: one pass, no block beside the result."""
    single = weights.astype(np.float32)
    result: Rows = np.empty(rows.shape[1], np.float32)
    width = max(1024, BLOCK // (4 * len(rows))) if sd else rows.shape[1]
    for at in range(0, rows.shape[1], width):
        part = rows[:, at : at + width]
        result[at : at + width] = single @ (bounded(part, sd) if sd else part)
    return result


def _by_column(rows: Rows, weights: Floats | None, last: Columnwise, f: int, sd: float) -> Rows:
    n, d = rows.shape
    width, result = max(1024, BLOCK // (4 * n)), np.empty(d, np.float32)
    mixing = None if weights is None else weights.astype(np.float32)
    # One for all blocks: a new one each time is fetched from the system page by page.
    mixed = None if mixing is None else np.empty((len(mixing), width), np.float32)
    for at in range(0, d, width):
        part = rows[:, at : at + width]
        if sd:
            part = bounded(part, sd)
        if mixing is not None and mixed is not None:
            part = np.matmul(mixing, part, out=mixed[:, : part.shape[1]])
        result[at : at + width] = last.combine(part, f)
    return result


def gram_of(rows: Rows, noise: Sequence[float] | None = None) -> Gram:
    """Inner products of updates and the origin, moved by the most central update.

    Around the mean, one huge update would drown the distances between all others; around an update in the midst of
    them it harms its own only.

    Args:
        rows: [n, d].
        noise: as `combine` is given it.
    """
    from gapweave.server.products import products_around  # loads a compiler

    expected = None if noise is None else np.diag([*believed(noise), 0.0])
    return Gram(products_around(rows, _central(rows)), expected, _lot(rows))


def _some(rows: Rows) -> Rows:
    return rows[:, :: max(1, rows.shape[1] // SAMPLED)]


def _lot(rows: Rows) -> bytes:
    """Not read off the Gram matrix, which rounds otherwise when the same updates come in another order."""
    return hashlib.sha256(b"".join(sorted(hashlib.sha256(row.tobytes()).digest() for row in _some(rows)))).digest()


def _central(rows: Rows) -> int:
    """The update with the smallest median distance to the others, on some thousand coordinates.

    Of two the shorter one: they are as far from each other, and around one without bounds the other's length is lost
    in rounding. Among three and more, screening has taken such lengths out.
    """
    if len(rows) < 3:
        return int(np.argmin([np.vdot(row, row) for row in rows]))
    some = _some(rows).astype(np.float64)
    squares = (some**2).sum(1)
    distances = squares[:, None] + squares[None, :] - 2 * some @ some.T
    return int(np.argmin(np.median(distances, axis=1)))
