"""The strength of a logistic regression's penalty is the one that scikit-learn's own search finds."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from gapweave.client.classical import STRENGTHS, logistic_regression


@pytest.mark.parametrize(("rows", "width", "signal"), [(60, 40, 0.2), (120, 8, 1.0), (300, 5, 2.0), (400, 60, 0.0)])
def test_the_strength_is_that_of_a_search_by_scikit_learn(rows: int, width: int, signal: float) -> None:
    generator = np.random.default_rng([rows, width])
    features = generator.normal(2, 3, size=(rows, width))
    target = generator.random(rows) < 1 / (1 + np.exp(-signal * (features[:, 0] - 2)))
    patient = np.arange(rows) // 2
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    searched = GridSearchCV(
        model, {"logisticregression__C": STRENGTHS}, scoring="neg_log_loss", cv=StratifiedGroupKFold(5)
    ).fit(features, target, groups=patient)
    found = logistic_regression(features, target, patient)
    assert searched.best_params_["logisticregression__C"] == found[1].C
    np.testing.assert_allclose(found.decision_function(features), searched.decision_function(features), atol=1e-9)


def test_a_class_that_one_patient_holds_is_learnt_from() -> None:
    features = np.random.default_rng(0).normal(size=(12, 3))
    target = np.array([True] * 2 + [False] * 10)
    for patient in (np.repeat([0, 1, 2], 4), np.array([0, 1, 1, *range(2, 11)])):
        assert np.isfinite(logistic_regression(features, target, patient).decision_function(features)).all()
