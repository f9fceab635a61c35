"""Baselines are those of scikit-learn: found with less work, and no other."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from gapweave.client.classical import STRENGTHS, Trees, gradient_boosting, logistic_regression


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


@pytest.mark.parametrize(
    ("patient", "target"),
    [
        ([0, 0, 0, 0, 1, 1, 2, 2], [1, 1, 0, 0, 0, 0, 0, 0]),  # one patient holds a class: no folds
        ([0, 0, 0, 1, 1, 2, 3, 4, 4], [0, 1, 1, 0, 0, 1, 1, 1, 1]),  # a fold that leaves one class to learn from
    ],
)
def test_few_patients_of_a_class_are_learnt_from(patient: list[int], target: list[int]) -> None:
    features = np.random.default_rng(0).normal(size=(len(patient), 3))
    found = logistic_regression(features, np.array(target) > 0, np.array(patient))
    assert np.isfinite(found.decision_function(features)).all()


@pytest.mark.parametrize(("rows", "width"), [(30, 6), (45, 200), (90, 300), (500, 20)])
def test_boosting_without_columns_that_cannot_be_split_is_boosting_with_them(rows: int, width: int) -> None:
    """Columns from rare to common, with ties; also where no column can be split at all."""
    generator = np.random.default_rng([rows, width])
    common = generator.random((rows, width)) < generator.random(width)
    features = common * np.round(generator.random((rows, width)), 1)
    target = features[:, :5].sum(1) + generator.normal(0, 0.5, rows) > 1
    whole = HistGradientBoostingClassifier(max_iter=80, max_leaf_nodes=8, random_state=0).fit(features, target)
    found = gradient_boosting(features, target, np.arange(rows))
    others = np.concatenate([features, generator.random((200, width))])
    np.testing.assert_array_equal(found.decision_function(others), whole.decision_function(others))
    np.testing.assert_allclose(Trees.of(found).logits(others), whole.decision_function(others), atol=1e-12)
