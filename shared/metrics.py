"""Metrics of predictions, computed exactly: for simulations and for a site's own eyes, never for release."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gapweave.shared.objective import TaskKind

METRICS = ("auroc", "auprc", "brier", "ece")
BINS = 10
"""Equal-mass bins of the expected calibration error."""

Metrics = dict[str, float | None]


def exact_metrics(
    probabilities: NDArray[np.float64], target: NDArray[np.float64], known: NDArray[np.bool_], kind: TaskKind
) -> Metrics:
    """AUROC, AUPRC, Brier score and expected calibration error.

    Multilabel: the mean over labels; multiclass: the mean over one-versus-rest problems.

    Args:
        probabilities: [R, classes]; for binary both classes.
        target: [R, K], K = 1 for binary.
        known: [R, K], which targets are known.
        kind: of the task.

    Returns:
        A number each, or None where it is undefined (no record, or one class only for AUROC and AUPRC).
    """
    columns = metrics_by_output(probabilities, target, known, kind)
    return {name: _mean([column[name] for column in columns]) for name in METRICS}


def metrics_by_output(
    probabilities: NDArray[np.float64], target: NDArray[np.float64], known: NDArray[np.bool_], kind: TaskKind
) -> list[Metrics]:
    """What `exact_metrics` averages: one entry a class or label, one in all for binary.

    Beside the metrics, `records` whose target is known, and `positives` among them.
    """
    scores = probabilities[:, 1:] if kind == "binary" else probabilities
    result = []
    for k in range(scores.shape[1]):
        of = known[:, k]
        counts = {"records": float(of.sum()), "positives": float(target[of, k].sum())}
        result.append({**counts, **_two_class(scores[of, k], target[of, k])})
    return result


def _mean(values: list[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None


def _two_class(score: NDArray[np.float64], target: NDArray[np.float64]) -> Metrics:
    if len(target) == 0 or np.isnan(score).any():
        return dict.fromkeys(METRICS)
    from sklearn.metrics import average_precision_score, roc_auc_score

    both = 0 < target.sum() < len(target)
    return {
        "auroc": float(roc_auc_score(target, score)) if both else None,
        "auprc": float(average_precision_score(target, score)) if both else None,
        "brier": float(np.mean((score - target) ** 2)),
        "ece": _calibration_error(score, target),
    }


def _calibration_error(score: NDArray[np.float64], target: NDArray[np.float64]) -> float:
    """Mean distance of confidence and frequency over equal-mass bins (Naeini et al., AAAI 2015)."""
    order = np.argsort(score, kind="stable")
    bins = [part for part in np.array_split(order, BINS) if len(part)]
    return float(sum(len(part) * abs(score[part].mean() - target[part].mean()) for part in bins) / len(score))
