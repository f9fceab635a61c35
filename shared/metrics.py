"""Metrics of predictions, computed exactly: for simulations and for a site's own eyes, never for release."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from gapweave.shared.objective import TaskKind

METRICS = ("auroc", "auprc", "brier", "ece")
BINS = 10
"""Equal-mass bins of the expected calibration error."""

Metrics = dict[str, float | None]
Scores = NDArray[np.float64]


def exact_metrics(
    probabilities: NDArray[np.float64],
    target: NDArray[np.float64],
    known: NDArray[np.bool_],
    kind: TaskKind,
    fold: NDArray[np.int64] | None = None,
) -> Metrics:
    """AUROC, AUPRC, Brier score and expected calibration error.

    Multilabel: the mean over labels; multiclass: the mean over one-versus-rest problems.

    Args:
        probabilities: [R, classes]; for binary both classes.
        target: [R, K], K = 1 for binary.
        known: [R, K], which targets are known.
        kind: of the task.
        fold: [R], as of `paired.Truth`: AUROC and AUPRC are of the records of each fold. Ranked among all, models of a
            small site look worse than they are: where a fold has many positives its model was trained on few, and
            scores all of them low (Parker et al. 2007, BMC Bioinformatics 8:326).

    Returns:
        A number each, or None where it is undefined (no record, or one class only for AUROC and AUPRC).
    """
    columns = metrics_by_output(probabilities, target, known, kind, fold)
    return {name: _mean([column[name] for column in columns]) for name in METRICS}


def metrics_by_output(
    probabilities: NDArray[np.float64],
    target: NDArray[np.float64],
    known: NDArray[np.bool_],
    kind: TaskKind,
    fold: NDArray[np.int64] | None = None,
) -> list[Metrics]:
    """What `exact_metrics` averages: one entry a class or label, one in all for binary.

    Beside the metrics, `records` whose target is known, and `positives` among them.
    """
    scores = probabilities[:, 1:] if kind == "binary" else probabilities
    result = []
    for k in range(scores.shape[1]):
        of = known[:, k]
        counts = {"records": float(of.sum()), "positives": float(target[of, k].sum())}
        result.append({**counts, **_two_class(scores[of, k], target[of, k], None if fold is None else fold[of])})
    return result


def folds(fold: NDArray[np.int64] | None, records: int) -> list[NDArray[np.bool_]]:
    """By fold, which of the records are in it; all of them without folds."""
    return [np.ones(records, np.bool_)] if fold is None else [fold == one for one in np.unique(fold)]


def _mean(values: list[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None


def _two_class(score: Scores, target: Scores, fold: NDArray[np.int64] | None) -> Metrics:
    if len(target) == 0 or np.isnan(score).any():
        return dict.fromkeys(METRICS)
    from sklearn.metrics import average_precision_score, roc_auc_score

    parts = [(target[part], score[part]) for part in folds(fold, len(score))]
    return {
        "auroc": _over_folds(parts, roc_auc_score, lambda of: of.sum() * (1 - of).sum()),
        "auprc": _over_folds(parts, average_precision_score, lambda of: of.sum()),
        "brier": float(np.mean((score - target) ** 2)),
        "ece": _calibration_error(score, target),
    }


def _over_folds(
    parts: list[tuple[Scores, Scores]], metric: Callable[[Scores, Scores], float], weight: Callable[[Scores], float]
) -> float | None:
    """Mean of a metric of targets and scores over folds that have both classes."""
    both = [(target, score) for target, score in parts if 0 < target.sum() < len(target)]
    weights = [float(weight(target)) for target, _ in both]
    return float(np.average([metric(*part) for part in both], weights=weights)) if both else None


def _calibration_error(score: Scores, target: Scores) -> float:
    """Mean distance of confidence and frequency over equal-mass bins (Naeini et al., AAAI 2015).

    Equal scores are in one bin, that of their mean rank: else the order of the records would decide.
    """
    from scipy.stats import rankdata

    bins = np.floor(BINS * (rankdata(score) - 0.5) / len(score)).astype(int)
    return float(np.abs(np.bincount(bins, score - target)).sum() / len(score))
