"""Probabilities that a site may read as risks: log-odds with the slope and the shift that suit its own patients.

A model that ranks well may be far from this hospital's frequencies: others' patients taught it, noise and a strong
ridge shorten its logits. Two or three numbers, found on the site's training patients, mend that (Platt 1999, in
Advances in Large Margin Classifiers; for several classes a temperature, Guo et al. 2017, arXiv 1706.04599, and a shift
for each class). Ranks stay as they are for binary outcomes and labels. The numbers stay at the site, as the joining
check does that finds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gapweave.client.mixture import Predictor, mix
from gapweave.client.predict import Predictions
from gapweave.shared.errors import UsageError
from gapweave.shared.joining import read_joining
from gapweave.shared.judging import FEWEST
from gapweave.shared.objective import TaskKind
from gapweave.shared.paired import SMALLEST, Truth, losses
from gapweave.shared.schema import Batch

Array = NDArray[np.float64]

SLOPES = tuple(2.0 ** (quarter / 4) for quarter in range(-12, 17))
"""Factors of logits, from 1/8 to 16, among which the log-loss chooses."""
ROUNDS, NEAR = 50, 1e-5
"""Rounds of iterative scaling at most; each brings the mean prediction closer to the prevalence, until it is near."""
FARTHEST = 30.0
"""Shift of log-odds beyond which none is looked for: both `SMALLEST` and its complement are reached within it."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How a model's log-odds are changed.

    Attributes:
        slope: their factor.
        shift: added to the log-odds of class 1 (binary), to those of each label, or to the log of each class; None for
            a label of which the site has too few patients, whose probabilities stay as the model gives them.
    """

    slope: float
    shift: tuple[float | None, ...]

    def __call__(self, probabilities: Array, kind: TaskKind) -> Array:
        """The probabilities as the site may read them.

        Args:
            probabilities: [R, classes]; for binary both classes.
            kind: of the task.
        """
        known = np.array([value is not None for value in self.shift])
        shift = tuple(value or 0.0 for value in self.shift)
        changed = _shifted(mix([probabilities], [self.slope], kind), shift, kind)
        return np.where(known, changed, probabilities) if kind == "multilabel" else changed

    def to_dict(self) -> dict[str, Any]:
        """As joining.json keeps it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Calibration:
        """Read it from joining.json."""
        return cls(slope=float(content["slope"]), shift=tuple(content["shift"]))


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """A predictor whose probabilities are changed, but for records without any modality: they get the prevalence."""

    predictor: Predictor
    calibration: Calibration
    kind: TaskKind

    def __call__(self, batch: Batch) -> Predictions:
        """Predictions; a modality's own vote stays as it is."""
        found = self.predictor(batch)
        something = batch.present.any(1).cpu().numpy()[:, None]
        changed = self.calibration(found.probabilities, self.kind)
        return replace(found, probabilities=np.where(something, changed, found.probabilities))


def calibration_of(folder: Path, model: str) -> Calibration:
    """What the joining check found for one of a site's models.

    Args:
        folder: STATE/runs/<run>.
        model: its name in joining.json, as `choose` gives it.

    Raises:
        UsageError: when the check was not made, or had too few patients for it.
    """
    joining = read_joining(folder)
    found = {} if joining is None else joining.get("calibrations", {})
    if model not in found:
        few = joining is not None and "calibrations" in joining
        raise UsageError(
            f"there is no calibration of the model {model!r}"
            + (f": fewer than {FEWEST} training patients of a class" if few else ""),
            where=str(folder),
            remedy="Leave --calibrated out" if few else "Make the joining check: `gapweave site report`, or --joining",
        )
    return Calibration.from_dict(found[model])


def enough(truth: Truth) -> bool:
    """Whether there are patients enough to calibrate by.

    Of several classes each needs `FEWEST`, for their probabilities add up to 1: one that the site has never seen would
    be said to be impossible. Labels stand by themselves, and one is enough.
    """
    return (min(truth.sides) if truth.kind == "multiclass" else truth.rarer()) >= FEWEST


def calibrate(probabilities: Array, truth: Truth) -> Calibration:
    """The slope of the least log-loss, each tried with the shift that suits it.

    Args:
        probabilities: [R, classes] of the training patients; for binary both classes. Of models that saw them, the
            federated one, these are surer than those of others: by little, as it saw many more or had noise.
        truth: of the records; labels with fewer than `FEWEST` patients on a side are left as they are, where others
            have as many.
    """
    if truth.kind == "multilabel":
        judged = np.isin(np.arange(len(truth.sides)), truth.judged)
        truth = replace(truth, known=truth.known & judged)
    tried = [
        Calibration(slope=slope, shift=to_prevalence(mix([probabilities], [slope], truth.kind), truth))
        for slope in SLOPES
    ]
    return min(tried, key=lambda one: log_loss(one(probabilities, truth.kind), truth))


def log_loss(probabilities: Array, truth: Truth) -> float:
    """Mean over patients."""
    return float(np.nanmean(losses(probabilities, truth)))


def _shifted(probabilities: Array, shift: tuple[float, ...], kind: TaskKind) -> Array:
    if kind == "multiclass":
        moved = np.clip(probabilities, SMALLEST, 1.0) * np.exp(shift)
        return np.asarray(moved / moved.sum(1, keepdims=True))
    scores = np.clip(probabilities[:, 1:] if kind == "binary" else probabilities, SMALLEST, 1 - SMALLEST)
    odds = scores / (1 - scores) * np.exp(shift)
    positive = odds / (1 + odds)
    return np.concatenate([1 - positive, positive], 1) if kind == "binary" else np.asarray(positive)


def to_prevalence(probabilities: Array, truth: Truth) -> tuple[float | None, ...]:
    """The shift that brings mean probabilities to the prevalences of the records: that of the least log-loss.

    None for a label that no record has.

    Args:
        probabilities: [R, classes]; for binary both classes.
        truth: of the records.
    """
    if truth.kind == "multiclass":
        return tuple(_log_factors(probabilities, truth.target, truth.known[:, 0]).tolist())
    scores = probabilities[:, 1:] if truth.kind == "binary" else probabilities
    columns = ((scores[known, k], truth.target[known, k]) for k, known in enumerate(truth.known.T))
    return tuple(_offset(score, target) for score, target in columns)


def _offset(score: Array, target: Array) -> float | None:
    """What added to the log-odds makes their mean probability the share of ones; None without records."""
    from scipy.optimize import brentq
    from scipy.special import expit, logit

    if not len(score):
        return None
    odds, share = logit(np.clip(score, SMALLEST, 1 - SMALLEST)), np.clip(target.mean(), SMALLEST, 1 - SMALLEST)
    return float(brentq(lambda shift: expit(odds + shift).mean() - share, -FARTHEST, FARTHEST, xtol=NEAR))


def _log_factors(probabilities: Array, target: Array, known: NDArray[np.bool_]) -> Array:
    """[C]: logs of the factors that bring each class's mean to its frequency, a record's sum kept 1."""
    found, logs = np.clip(probabilities[known], SMALLEST, 1.0), np.zeros(probabilities.shape[1])
    wanted = target[known].mean(0) if len(found) else logs
    for _ in range(ROUNDS if len(found) else 0):
        mean = found.mean(0)
        if np.abs(mean - wanted).max() < NEAR:
            break
        factors = np.maximum(wanted, SMALLEST) / np.maximum(mean, SMALLEST)
        logs += np.log(factors)
        found = found * factors
        found = found / np.maximum(found.sum(1, keepdims=True), SMALLEST)
    return logs
