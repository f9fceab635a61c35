"""What a user would pick instead: each site alone, all data pooled, logistic regression, gradient boosting.

All of them train without privacy and see what the federated model sees: the same features of the same training
patients. Nothing here is tuned on the test patients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gapweave.client.data import Cohort
from gapweave.client.predict import Predictions, predict
from gapweave.client.training import Sgd, Step, build_engine, train
from gapweave.shared.config import Study
from gapweave.shared.features.flat import flat
from gapweave.shared.model import MultimodalModel
from gapweave.shared.privacy.draws import SeededDraws
from gapweave.shared.privacy.plan import make_plan
from gapweave.shared.schema import Batch, modalities
from gapweave.shared.schemes import Moment

BASELINES = ("local", "pooled", "lr", "gbm")
"""Values of `--baselines`; lr and gbm are fitted both locally and pooled."""

Predictor = Callable[[Batch], Predictions]


def without_privacy(study: Study, batch: int | None = None) -> Study:
    """The study as a baseline trains it."""
    training = study.training if batch is None else study.training.model_copy(update={"batch": batch})
    privacy = study.privacy.model_copy(update={"enabled": False})
    return study.model_copy(update={"privacy": privacy, "training": training})


def train_alone(study: Study, data: Batch, held: list[str], name: str) -> MultimodalModel:
    """Train the study's model on one body of data for as many steps as the federated run takes.

    Args:
        study: privacy is switched off.
        data: training records.
        held: modalities in them.
        name: keys the draws.
    """
    study = without_privacy(study)
    model = MultimodalModel(study, held)
    plan = make_plan(study, max(1, data.patients), study.privacy.delta)
    draws = SeededDraws(study.seed, name, "alone")
    engine, optimizer = build_engine(model, study), Sgd(study, {})
    ready = replace(data, inputs=model.features(data.inputs, data.present))
    for number in range(1, plan.rounds + 1):
        step = Step(study=study, plan=plan, engine=engine, draws=draws, at=Moment(number, plan.rounds))
        train(model, ready, step, optimizer, plan.steps)
    return model


def local_network(study: Study, cohort: Cohort) -> Predictor:
    """The same network, trained at one site alone."""
    training = cohort.training()
    model = train_alone(study, training, list(training.inputs), cohort.site)
    return lambda batch: predict(model, batch, study, training.prevalence())


def pooled_network(study: Study, cohorts: Mapping[str, Cohort]) -> Predictor:
    """The same network, trained on all sites' data in one place; its batches are as large as a round's of all."""
    pooled = pool(study, [cohort.training() for cohort in cohorts.values()])
    study = without_privacy(study, study.training.batch * len(cohorts))
    model = train_alone(study, pooled, list(study.order), "pooled")
    return lambda batch: predict(model, _complete(study, batch), study, pooled.prevalence())


def pool(study: Study, batches: list[Batch]) -> Batch:
    """All batches as one; a site's missing modalities are absent rows."""
    complete = [_complete(study, batch) for batch in batches]
    offsets = np.cumsum([0, *[batch.patients for batch in batches]])
    return Batch(
        inputs={name: torch.cat([batch.inputs[name] for batch in complete]) for name in study.order},
        present=torch.cat([batch.present for batch in complete]),
        target=torch.cat([batch.target for batch in complete]),
        label_mask=torch.cat([batch.label_mask for batch in complete]),
        patient=torch.cat([batch.patient + int(at) for batch, at in zip(complete, offsets[:-1], strict=True)]),
        weight=torch.cat([batch.weight for batch in complete]),
        patients=int(offsets[-1]),
    )


def _complete(study: Study, batch: Batch) -> Batch:
    """The batch with zero inputs for modalities that its site does not hold."""
    inputs = {
        modality.name: batch.inputs.get(modality.name, torch.zeros(len(batch), *modality.shape))
        for modality in modalities(study)
    }
    return Batch(**{**batch.__dict__, "inputs": inputs})


def flat_features(study: Study, batch: Batch) -> NDArray[np.float64]:
    """[R, F]: the features that the heads' linear paths read, and one availability flag a modality."""
    blocks = [batch.present.double()]
    for at, name in enumerate(study.order):
        if name not in batch.inputs:
            continue
        values = flat(study.modalities[name], batch.inputs[name])
        blocks.append(torch.where(batch.present[:, [at]], values.double(), 0.0))
    features: NDArray[np.float64] = torch.cat(blocks, dim=1).numpy()
    return features


STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Inverse strengths of the L2 penalty among which cross-validation on the training patients chooses."""

Fit = Callable[[NDArray[np.float64], NDArray[np.bool_], NDArray[np.int64]], Any]
"""(features [R, F], target [R], patient [R]) -> a fitted scikit-learn classifier."""


def logistic_regression(features: NDArray[np.float64], target: NDArray[np.bool_], patient: NDArray[np.int64]) -> Any:
    """L2 logistic regression on standardised features; its strength is chosen by grouped cross-validation."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTHS[1], max_iter=1000))
    folds = min(5, *(len(np.unique(patient[target == value])) for value in (False, True)))
    if folds < 2:
        return model.fit(features, target)
    search = GridSearchCV(
        model, {"logisticregression__C": STRENGTHS}, scoring="neg_log_loss", cv=StratifiedGroupKFold(folds)
    )
    return search.fit(features, target, groups=patient)


def gradient_boosting(features: NDArray[np.float64], target: NDArray[np.bool_], patient: NDArray[np.int64]) -> Any:
    """Gradient boosting of 80 small trees, as in the data sets' reference numbers."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    return HistGradientBoostingClassifier(max_iter=80, max_leaf_nodes=8, random_state=0).fit(features, target)


CLASSICAL: dict[str, Fit] = {"lr": logistic_regression, "gbm": gradient_boosting}


def fit_classical(study: Study, data: Batch, fit: Fit) -> Predictor:
    """Fit one scikit-learn model an output.

    Args:
        study: gives task and features.
        data: training records; those without a known target are left out.
        fit: fits one two-class model.
    """
    features, prior = flat_features(study, data), data.prevalence()
    usable = (data.weight > 0).numpy()
    columns = []
    for k in range(study.task.outputs):
        known = usable & data.label_mask[:, k].numpy()
        target = data.target[:, k].numpy()[known] > 0.5
        columns.append(_fit_output(fit, features[known], target, data.patient.numpy()[known], prior[k]))
    names = sorted(data.inputs)

    def answer(batch: Batch) -> Predictions:
        rows = flat_features(study, Batch(**{**batch.__dict__, "inputs": {name: batch.inputs[name] for name in names}}))
        scores = np.stack([column(rows) for column in columns], axis=1)
        if study.task.kind == "binary":
            scores = np.concatenate([1 - scores, scores], axis=1)
        elif study.task.kind == "multiclass":
            scores = scores / scores.sum(1, keepdims=True).clip(1e-12)
        votes = np.full((len(batch), len(study.order), scores.shape[1]), np.nan)
        return Predictions(probabilities=scores, votes=votes, weights=None)

    return answer


def _fit_output(
    fit: Fit,
    features: NDArray[np.float64],
    target: NDArray[np.bool_],
    patient: NDArray[np.int64],
    prior: float,
) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    """One two-class model as a function of features; of one class only, its prevalence."""
    if len(np.unique(target)) < 2:
        return lambda rows: np.full(len(rows), prior)
    model = fit(features, target, patient)
    return lambda rows: np.asarray(model.predict_proba(rows)[:, 1])


def fit_baselines(
    study: Study,
    cohorts: Mapping[str, Cohort],
    names: list[str],
    progress: Callable[[str], None] = lambda name: None,
) -> dict[str, dict[str, Predictor]]:
    """All baselines asked for: model name -> site -> predictor.

    Args:
        study: of the run.
        cohorts: by site.
        names: of `BASELINES`.
        progress: told the name of each fit.
    """
    result: dict[str, dict[str, Predictor]] = {}
    if "local" in names:
        result["local"] = {}
        for site, cohort in cohorts.items():
            progress(f"local {site}")
            result["local"][site] = local_network(study, cohort)
    if "pooled" in names:
        progress("pooled")
        result["pooled"] = dict.fromkeys(cohorts, pooled_network(study, cohorts))
    for name in ("lr", "gbm"):
        if name in names:
            progress(name)
            result |= _fit_classical_both(study, cohorts, name)
    return result


def _fit_classical_both(study: Study, cohorts: Mapping[str, Cohort], name: str) -> dict[str, dict[str, Predictor]]:
    fit = CLASSICAL[name]
    local = {site: fit_classical(study, cohort.training(), fit) for site, cohort in cohorts.items()}
    together = fit_classical(study, pool(study, [cohort.training() for cohort in cohorts.values()]), fit)

    def on_all(batch: Batch) -> Predictions:
        return together(_complete(study, batch))

    return {f"{name}_local": local, f"{name}_pooled": dict.fromkeys(cohorts, on_all)}
