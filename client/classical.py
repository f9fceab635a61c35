"""Logistic regression and gradient boosting on flat features, as arrays: a site keeps them without a pickle.

They train without privacy on the site's own patients, or in a simulation on all; none of them ever leaves a site.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gapweave.client.predict import Predictions
from gapweave.shared import tensorfile
from gapweave.shared.config import Study
from gapweave.shared.features.flat import flat
from gapweave.shared.schema import Batch

Array = NDArray[np.float64]

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Inverse strengths of the L2 penalty among which cross-validation on the training patients chooses."""

Fit = Callable[[Array, NDArray[np.bool_], NDArray[np.int64]], Any]
"""(features [R, F], target [R], patient [R]) -> a fitted scikit-learn classifier."""


def flat_features(study: Study, batch: Batch, names: Collection[str]) -> Array:
    """[R, F]: the features that the heads' linear paths read, and one availability flag a modality.

    Args:
        study: gives the kinds of the modalities.
        batch: records.
        names: modalities to be read.
    """
    blocks = [batch.present[:, [at for at, name in enumerate(study.order) if name in names]].double()]
    for at, name in enumerate(study.order):
        if name not in names:
            continue
        values = flat(study.modalities[name], batch.inputs[name])
        blocks.append(torch.where(batch.present[:, [at]], values.double(), 0.0))
    features: Array = torch.cat(blocks, dim=1).numpy()
    return features


def logistic_regression(features: Array, target: NDArray[np.bool_], patient: NDArray[np.int64]) -> Any:
    """L2 logistic regression on standardised features; its strength is chosen by grouped cross-validation."""
    from sklearn import config_context
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    with config_context(assume_finite=True, skip_parameter_validation=True):
        model = LogisticRegression(C=_strength(features, target, patient), max_iter=1000)
        return make_pipeline(StandardScaler(), model).fit(features, target)


def _strength(features: Array, target: NDArray[np.bool_], patient: NDArray[np.int64]) -> float:
    """The one of `STRENGTHS` with the smallest log loss on the patients left out, mean over up to five folds.

    Each fold goes on from the stronger penalty's solution. `GridSearchCV` finds the same, and on some hundred patients
    takes three times as long, most of it to check its inputs again; `LogisticRegressionCV` takes no fold's own scaler,
    and its attributes differ from version to version.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.preprocessing import StandardScaler

    folds = min(5, *(len(np.unique(patient[target == value])) for value in (False, True)))
    if folds < 2:
        return STRENGTHS[1]
    losses = np.zeros(len(STRENGTHS))
    for train, test in StratifiedGroupKFold(folds).split(features, target, patient):
        if len(np.unique(target[train])) < 2:  # a patient with records of both classes may hold the last of one
            continue
        scaler = StandardScaler().fit(features[train])
        rows, wrong = scaler.transform(features[train]), np.where(target[test], -1, 1)
        left_out, model = scaler.transform(features[test]), LogisticRegression(max_iter=1000, warm_start=True)
        for at, strength in enumerate(STRENGTHS):
            model.set_params(C=strength).fit(rows, target[train])
            losses[at] += np.logaddexp(0, wrong * model.decision_function(left_out)).mean()
    return STRENGTHS[int(losses.argmin())]


LEAF = 20
"""Fewest records of a leaf; scikit-learn's default."""


def gradient_boosting(features: Array, target: NDArray[np.bool_], patient: NDArray[np.int64]) -> Any:
    """Gradient boosting of 80 small trees, as in the data sets' reference numbers.

    A feature that no threshold can split into two leaves is left out: no tree would use it. Of a small site's, most
    words and flags are such, and boosting looked at them again for each node.
    """
    from sklearn.compose import ColumnTransformer
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.pipeline import make_pipeline

    trees = HistGradientBoostingClassifier(max_iter=80, max_leaf_nodes=8, min_samples_leaf=LEAF, random_state=0)
    kept = ColumnTransformer([("splittable", "passthrough", _splittable(features))])
    return make_pipeline(kept, trees).fit(features, target)


def _splittable(features: Array) -> NDArray[np.int64]:
    """Columns that have a threshold with `LEAF` records on either side; the first one where none has."""
    if len(features) < 2 * LEAF:
        return np.zeros(1, np.int64)
    ordered = np.partition(features, (LEAF - 1, len(features) - LEAF), axis=0)
    found = np.flatnonzero(ordered[LEAF - 1] < ordered[-LEAF])
    return found if len(found) else np.zeros(1, np.int64)


CLASSICAL: dict[str, Fit] = {"lr": logistic_regression, "gbm": gradient_boosting}


@dataclass(frozen=True, kw_only=True)
class Linear:
    """Log-odds that are a linear function of the features."""

    weight: Array
    bias: Array

    @classmethod
    def of(cls, pipeline: Any) -> Linear:
        """A fitted `logistic_regression`: the scaler folded into the weights."""
        scaler, model = (step for _, step in pipeline.steps)
        weight = model.coef_[0] / scaler.scale_
        return cls(weight=weight, bias=np.array([model.intercept_[0] - weight @ scaler.mean_]))

    def logits(self, features: Array) -> Array:
        """[R, F] -> [R]."""
        return features @ self.weight + self.bias


@dataclass(frozen=True, kw_only=True)
class Trees:
    """Log-odds that are a sum over trees; all trees' nodes in one table each, a leaf pointing at itself."""

    feature: NDArray[np.int64]
    threshold: Array
    left: NDArray[np.int64]
    right: NDArray[np.int64]
    value: Array
    roots: NDArray[np.int64]
    bias: Array

    @classmethod
    def of(cls, model: Any) -> Trees:
        """A fitted `gradient_boosting`; scikit-learn shows its trees under private names only."""
        (_, kept), (_, trees) = model.steps
        ((_, _, columns),) = kept.transformers
        nodes = [predictor.nodes for (predictor,) in trees._predictors]
        roots = np.cumsum([0, *(len(tree) for tree in nodes[:-1])])
        joined = np.concatenate(nodes)
        offset = np.repeat(roots, [len(tree) for tree in nodes])
        leaf, own = joined["is_leaf"].astype(bool), np.arange(len(joined))
        return cls(
            feature=columns[joined["feature_idx"]],
            threshold=joined["num_threshold"],
            left=np.where(leaf, own, joined["left"] + offset),
            right=np.where(leaf, own, joined["right"] + offset),
            value=joined["value"],
            roots=roots,
            bias=trees._baseline_prediction.ravel(),
        )

    def logits(self, features: Array) -> Array:
        """[R, F] -> [R]."""
        at, before = np.tile(self.roots, (len(features), 1)), None
        rows = np.arange(len(features))[:, None]
        while before is None or (at != before).any():
            before = at
            at = np.where(features[rows, self.feature[at]] <= self.threshold[at], self.left[at], self.right[at])
        return np.asarray(self.value[at].sum(1) + self.bias)


FORMS: dict[str, type[Linear] | type[Trees]] = {"lr": Linear, "gbm": Trees}
"""Form in which a fitted model of `CLASSICAL` is kept."""


@dataclass(frozen=True, kw_only=True)
class Classical:
    """One two-class model an output.

    Attributes:
        study: gives task and features.
        name: of `CLASSICAL`.
        read: modalities whose features it takes.
        columns: by output; of one that had a single class to learn from the constant log-odds, NaN if it had none.
    """

    study: Study
    name: str
    read: tuple[str, ...]
    columns: tuple[Linear | Trees, ...]

    def __call__(self, batch: Batch) -> Predictions:
        """Predictions for records that hold the modalities read; there are no votes and no weights."""
        from scipy.special import expit  # slow to import, and simulations name these models

        rows, kind = flat_features(self.study, batch, self.read), self.study.task.kind
        logits = np.stack([column.logits(rows) for column in self.columns], axis=1)
        scores = expit(logits)
        if kind == "binary":
            scores = np.concatenate([1 - scores, scores], axis=1)
        elif kind == "multiclass":
            scores = scores / scores.sum(1, keepdims=True).clip(1e-12)
        votes = np.full((len(batch), len(self.study.order), scores.shape[1]), np.nan)
        return Predictions(probabilities=scores, votes=votes, weights=None)

    def dump(self, card: Mapping[str, Any]) -> bytes:
        """The model as a safetensors file with the card of the site's model beside it."""
        arrays: dict[str, dict[str, NDArray[Any]]] = {str(k): vars(column) for k, column in enumerate(self.columns)}
        forms = ["lr" if isinstance(column, Linear) else "gbm" for column in self.columns]
        return tensorfile.dump(arrays, {**card, "classical": {"name": self.name, "read": self.read, "forms": forms}})

    @classmethod
    def parse(cls, content: bytes, study: Study) -> Classical:
        """What `dump` wrote."""
        kept, card = tensorfile.parse(content)
        arrays: dict[str, dict[str, Any]] = dict(kept)
        note = card["classical"]
        columns = tuple(FORMS[form](**arrays[str(k)]) for k, form in enumerate(note["forms"]))
        return cls(study=study, name=note["name"], read=tuple(note["read"]), columns=columns)


def fit_classical(study: Study, data: Batch, name: str, read: Collection[str] | None = None) -> Classical:
    """Fit one scikit-learn model an output.

    Args:
        study: gives task and features.
        data: training records; those without a known target are left out.
        name: of `CLASSICAL`.
        read: modalities whose features it takes; all that the data hold by default.
    """
    names = tuple(sorted(data.inputs if read is None else read))
    features, prior = flat_features(study, data, names), data.prevalence()
    usable = (data.weight > 0).numpy()
    columns = []
    for k in range(study.task.outputs):
        known = usable & data.label_mask[:, k].numpy()
        target = data.target[:, k].numpy()[known] > 0.5
        columns.append(_fit_output(name, features[known], target, data.patient.numpy()[known], prior[k]))
    return Classical(study=study, name=name, read=names, columns=tuple(columns))


def _fit_output(
    name: str, features: Array, target: NDArray[np.bool_], patient: NDArray[np.int64], prior: float
) -> Linear | Trees:
    """One two-class model; of one class only, the log-odds of its prevalence; NaN where nothing is known."""
    if len(np.unique(target)) < 2:
        share = np.clip(prior, 1e-6, 1 - 1e-6)
        return Linear(weight=np.zeros(features.shape[1]), bias=np.array([np.log(share / (1 - share))]))
    return FORMS[name].of(CLASSICAL[name](features, target, patient))
