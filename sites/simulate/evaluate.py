"""Exact metrics of virtual sites. A simulation may look at everything; a deployed site never sends these."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gapweave.client.data import Cohort
from gapweave.client.predict import Predictions, predict
from gapweave.shared.config import Study
from gapweave.shared.metrics import METRICS, Metrics, exact_metrics, metrics_by_output
from gapweave.shared.model import MultimodalModel
from gapweave.shared.paired import Truth
from gapweave.shared.schema import Batch

PARTS = ("metrics", "outputs", "subgroups", "patterns")
"""Keys of what `evaluate_parts` gives."""
FEWEST, FEWEST_EVENTS = 50, 10
"""Patients, and patients of the rarer class, below which a missing pattern is counted among the others."""
OTHERS = "others"


def evaluate(model: MultimodalModel, cohort: Cohort, study: Study) -> Metrics:
    """Metrics of a model on a site's held-out patients."""
    test = cohort.testing()
    predictions = predict(model, test, study, cohort.training().prevalence())
    return metrics_of(predictions, test, study)


def evaluate_parts(model: MultimodalModel, cohort: Cohort, study: Study) -> dict[str, Any]:
    """Metrics of a model on a site's held-out patients, as a whole and by part.

    Returns:
        `metrics`; `outputs`: by class or label, with the numbers of records and positives; `subgroups`: by subgroup and
        its code, with the number of labelled records. Records of unknown code are left out of these. `patterns`: by the
        modalities that a record has, likewise, rare patterns together; empty where all have the same.
    """
    test = cohort.testing()
    scores = predict(model, test, study, cohort.training().prevalence()).probabilities
    target, known, kind = test.target.double().numpy(), test.label_mask.numpy(), study.task.kind
    names = study.task.labels if kind == "binary" else study.task.class_names
    subgroups: dict[str, dict[str, Metrics]] = {}
    for name, codes in cohort.testing_subgroups().items():
        of_record = np.array([code or "" for code in codes])
        subgroups[name] = {}
        for code in sorted(set(of_record) - {""}):
            rows = of_record == code
            found = exact_metrics(scores[rows], target[rows], known[rows], kind)
            subgroups[name][str(code)] = {"records": labelled(known[rows]), **found}
    patterns = {
        name: {"records": labelled(known[rows]), **exact_metrics(scores[rows], target[rows], known[rows], kind)}
        for name, rows in _patterns(test, study).items()
    }
    return {
        "metrics": exact_metrics(scores, target, known, kind),
        "outputs": dict(zip(names, metrics_by_output(scores, target, known, kind), strict=True)),
        "subgroups": subgroups,
        "patterns": patterns if len(patterns) > 1 else {},
    }


def labelled(known: NDArray[np.bool_]) -> float:
    """How many records have a label, of [R, K] known ones."""
    return float(known.any(axis=1).sum())


def _patterns(test: Batch, study: Study) -> dict[str, NDArray[np.bool_]]:
    """By missing pattern, which records have it; patterns of few patients or events are joined."""
    present, found = test.present.numpy(), dict[str, NDArray[np.bool_]]()
    for pattern in np.unique(present, axis=0):
        rows = (present == pattern).all(axis=1)
        of = test.rows(torch.from_numpy(np.flatnonzero(rows)))
        enough = len(np.unique(of.patient.numpy())) >= FEWEST and Truth.of(of, study.task.kind).rarer() >= FEWEST_EVENTS
        name = "+".join(name for name, there in zip(study.order, pattern, strict=True) if there) if enough else OTHERS
        found[name] = found.get(name, np.zeros(len(test), np.bool_)) | rows
    return found


def metrics_of(predictions: Predictions, test: Batch, study: Study) -> Metrics:
    """Metrics of predictions for the records of a batch."""
    return exact_metrics(
        predictions.probabilities, test.target.double().numpy(), test.label_mask.numpy(), study.task.kind
    )


def mean_metrics(per_site: list[Metrics]) -> Metrics:
    """Mean over sites, of those where a metric is defined."""
    names = dict.fromkeys([*METRICS, *(name for metrics in per_site for name in metrics)])
    result: Metrics = {}
    for name in names:
        values = [value for metrics in per_site if (value := metrics[name]) is not None]
        result[name] = float(torch.tensor(values, dtype=torch.float64).mean()) if values else None
    return result
