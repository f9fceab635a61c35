"""Two models on the same patients: losses a patient, and bootstrap intervals of differences of AUROC.

For a site's own eyes and for simulations; nothing here is noised.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray

from gapweave.shared.judging import FEWEST
from gapweave.shared.metrics import folds
from gapweave.shared.objective import TaskKind
from gapweave.shared.schema import Batch

DRAWS = 1000
"""Resamples of the patients."""
SEED = 0
"""Of the resamples; public, so that equal scores give equal intervals."""
SMALLEST = 1e-6
"""Probabilities are kept this far from 0 and 1 before a logarithm is taken."""

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What is known of some patients' records.

    Attributes:
        target: [R, K], 0 or 1; one-hot for multiclass.
        known: [R, K], which targets are known.
        patient: [R], position of the record's patient.
        patients: number of patients.
        kind: of the task.
        fold: [R], for scores out of fold: which of a model's copies scored the record. Only records of one fold are
            ranked against each other; None for one copy.
    """

    target: Array
    known: NDArray[np.bool_]
    patient: NDArray[np.int64]
    patients: int
    kind: TaskKind
    fold: NDArray[np.int64] | None = None

    @classmethod
    def of(cls, batch: Batch, kind: TaskKind, fold: NDArray[np.int64] | None = None) -> Truth:
        """That of a batch's records."""
        return cls(
            fold=fold,
            target=batch.target.double().cpu().numpy(),
            known=batch.label_mask.cpu().numpy(),
            patient=batch.patient.cpu().numpy(),
            patients=batch.patients,
            kind=kind,
        )

    @cached_property
    def sides(self) -> list[int]:
        """Of each output, patients of its rarer side."""
        return [min(self.count(k, 0), self.count(k, 1)) for k in range(self.target.shape[1])]

    @property
    def judged(self) -> list[int]:
        """Outputs with `FEWEST` patients on either side; where there is none, all, of which nothing can be said."""
        enough = [k for k, side in enumerate(self.sides) if side >= FEWEST]
        return enough or list(range(len(self.sides)))

    def rarer(self) -> int:
        """Patients of the rarer side of the judged output that has fewest: how much there is to judge a model by.

        Below `FEWEST` only where no output has as many; then of the one that is best off.
        """
        enough = [side for side in self.sides if side >= FEWEST]
        return min(enough) if enough else max(self.sides)

    def count(self, output: int, value: int) -> int:
        """Patients with a record whose target is known and has this value."""
        rows = self.known[:, output] & (self.target[:, output] == value)
        return len(np.unique(self.patient[rows]))


def losses(probabilities: Array, truth: Truth) -> Array:
    """[P]: each patient's log-loss, the mean over the known targets of the patient's records; NaN without any.

    Args:
        probabilities: [R, classes]; for binary both classes.
        truth: of the records.
    """
    scores = np.clip(_columns(probabilities, truth.kind), SMALLEST, 1 - SMALLEST)
    if truth.kind == "multiclass":
        by_target = -truth.target * np.log(scores) * truth.target.shape[1]
    else:
        by_target = -np.where(truth.target > 0.5, np.log(scores), np.log1p(-scores))
    total = np.bincount(truth.patient, np.where(truth.known, by_target, 0.0).sum(1), truth.patients)
    count = np.bincount(truth.patient, truth.known.sum(1), truth.patients)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _columns(probabilities: Array, kind: TaskKind) -> Array:
    """[R, K]: one score a target."""
    return probabilities[:, 1:] if kind == "binary" else probabilities


class Bootstrap:
    """Resamples of patients, the same for every model, so that differences are paired.

    Intervals are of percentiles (Efron and Tibshirani 1993, section 13.3), of 95 %.

    Args:
        truth: of the records.
        weights: of another one for the same patients, whose resamples these are then.
    """

    def __init__(self, truth: Truth, weights: Array | None = None) -> None:
        self._truth = truth
        self.weights: Array = self._resamples(truth) if weights is None else weights

    @staticmethod
    def _resamples(truth: Truth) -> Array:
        """[1 + DRAWS, R]: how often each record counts; first once."""
        drawn = np.random.default_rng(SEED).multinomial(
            truth.patients, np.full(truth.patients, 1 / max(1, truth.patients)), size=DRAWS
        )
        return np.concatenate([np.ones((1, truth.patients)), drawn])[:, truth.patient]

    def aurocs(self, probabilities: Array) -> Array:
        """[1 + DRAWS]: the AUROC, then those of the resamples; of several outputs the mean of the judged ones.

        An output with few patients on one side would be there in some resamples only, and mix two quantities.
        """
        scores, truth = _columns(probabilities, self._truth.kind), self._truth
        columns = [self._auroc(scores[:, k], k) for k in truth.judged if truth.known[:, k].any()]
        found = np.stack([*columns, np.full(len(self.weights), np.nan)])
        defined = ~np.isnan(found)
        mean = np.where(defined, found, 0.0).sum(0) / np.maximum(defined.sum(0), 1)
        return np.where(defined.any(0), mean, np.nan)

    def _auroc(self, score: Array, output: int) -> Array:
        """[1 + DRAWS]: of one output, over the pairs of each fold; NaN where there is no pair."""
        truth, rows = self._truth, self._truth.known[:, output]
        if np.isnan(score[rows]).any():
            return np.full(len(self.weights), np.nan)
        right, pairs = np.zeros((2, len(self.weights)))
        for part in folds(truth.fold, len(score)):
            chosen = rows & part
            if chosen.any():
                more = _pairs(score[chosen], truth.target[chosen, output] > 0.5, self.weights[:, chosen])
                right, pairs = right + more[0], pairs + more[1]
        return np.where(pairs > 0, right / np.where(pairs > 0, pairs, 1.0), np.nan)


def _pairs(score: Array, positive: NDArray[np.bool_], weights: Array) -> tuple[Array, Array]:
    """[D] each, under [D, R] weights: weight of pairs that [R] scores rank rightly, a tie counting half, and of all."""
    order = np.argsort(score, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(score[order]) > 0])
    sorted_weights, sign = weights[:, order], positive[order]
    gains = np.add.reduceat(np.where(sign, sorted_weights, 0.0), starts, axis=1)
    losses_ = np.add.reduceat(np.where(sign, 0.0, sorted_weights), starts, axis=1)
    below = np.cumsum(losses_, axis=1) - losses_ / 2
    return (gains * below).sum(1), gains.sum(1) * losses_.sum(1)


def interval(values: Array, rarer: int | None = None) -> tuple[float, float] | None:
    """The 95 % interval of resampled values, the first of which is the estimate itself; None where undefined.

    Percentiles alone are too narrow for few patients: 91 % of intervals held the truth with 8 of the rarer class.

    Args:
        values: [1 + DRAWS], of one model or of a difference of two.
        rarer: patients of the rarer class, for which percentiles farther out are taken (expanded percentile interval,
            Hesterberg 2015, The American Statistician 69(4)); None for many.
    """
    if np.isnan(values[0]):
        return None
    low, high = np.nanpercentile(values[1:], [100 * part for part in _tails(rarer)])
    return float(low), float(high)


@cache
def _tails(rarer: int | None) -> tuple[float, float]:
    if rarer is None:
        return 0.025, 0.975
    from scipy.stats import norm, t

    freedom = max(1, rarer - 1)
    tail = float(norm.cdf(-np.sqrt((freedom + 1) / freedom) * t.ppf(0.975, freedom)))
    return tail, 1 - tail
