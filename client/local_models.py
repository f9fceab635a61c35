"""Models that a site trains on its own patients alone, without privacy: what it would have if it did not join.

They and their scores never leave the site: no code that answers a server imports this module or opens its files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gapweave.client.calibration import log_loss
from gapweave.client.classical import CLASSICAL, Classical, fit_classical
from gapweave.client.data import Cohort
from gapweave.client.predict import Predictions, predict
from gapweave.client.preparation import own_constants
from gapweave.client.sources.split import validation_fold
from gapweave.client.state import RunFolder, to_arrays, to_tensors
from gapweave.client.training import Sgd, Step, build_engine, train
from gapweave.shared.config import Study
from gapweave.shared.late import add_late, late_mean
from gapweave.shared.model import MultimodalModel, groups, load_groups
from gapweave.shared.optimizers import ServerOptimizer
from gapweave.shared.paired import Truth
from gapweave.shared.privacy.draws import SeededDraws
from gapweave.shared.privacy.plan import make_plan
from gapweave.shared.schema import Batch
from gapweave.shared.schemes import Moment
from gapweave.shared.tensorfile import Arrays

SCORE = "score"
"""Name of the logistic regression on public scores alone."""


def fit_network(study: Study, data: Batch, held: list[str], name: str) -> LocalNetwork:
    """The study's network on one body of data, without noise.

    Nobody who trains alone needs to clip gradients, and most networks learn less that way; but a rate of learning that
    suits clipped ones can let others diverge. So one that fits its own patients worse than their prevalence does is
    trained again, clipped as in the run.

    Args:
        study: of the run.
        data: training records.
        held: modalities in them.
        name: keys the draws.
    """
    truth, prior = Truth.of(data, study.task.kind), data.prevalence()

    def fit(clipped: bool) -> LocalNetwork:
        return LocalNetwork(study=study, model=_train(study, data, held, name, clipped=clipped), prior=prior)

    network = fit(clipped=False)
    if not study.privacy.enabled:
        return network
    unseen = replace(data, present=torch.zeros_like(data.present))  # of which the prevalence is said
    # One that diverged beyond numbers says 0 of everybody.
    loss, base = (log_loss(np.nan_to_num(network(part).probabilities), truth) for part in (data, unseen))
    return network if loss <= base else fit(clipped=True)


def _train(study: Study, data: Batch, held: list[str], name: str, *, clipped: bool) -> MultimodalModel:
    """A federation of one: the run's steps, optimiser, averaging, and constants, as the data say without noise."""
    of_run = study
    study = of_run.model_copy(update={"privacy": of_run.privacy.model_copy(update={"enabled": False})})
    model = MultimodalModel(study, held, own_constants(study, held, data))
    plan = make_plan(study, max(1, data.patients), study.privacy.delta)
    draws = SeededDraws(study.seed, name, "alone")
    engine, optimizer = build_engine(model, of_run if clipped else study), Sgd(study, {})
    ready = replace(data, inputs=model.features(data.inputs, data.present))
    server, late = ServerOptimizer(study.aggregation), Arrays()
    current = to_arrays(groups(model))
    for number in range(1, plan.rounds + 1):
        step = Step(study=study, plan=plan, engine=engine, draws=draws, at=Moment(number, plan.rounds))
        train(model, ready, step, optimizer, plan.steps)
        trained = to_arrays(groups(model))
        for group, part in current.items():
            change = server.step(group, {name: trained[group][name] - value for name, value in part.items()})
            current[group] = {name: value + change[name] for name, value in part.items()}
        late = add_late(study, number, late, current)
        load_groups(model, to_tensors(current))
    load_groups(model, to_tensors(late_mean(study, late) or current))
    return model


@dataclass(frozen=True, kw_only=True)
class LocalNetwork:
    """The study's own network, trained on one body of data.

    Attributes:
        study: of the run.
        model: the network.
        prior: prevalences, said of records without any modality.
    """

    study: Study
    model: MultimodalModel
    prior: Sequence[float]

    def __call__(self, batch: Batch) -> Predictions:
        """What it says of records; nothing of a label that the site has never seen."""
        found = predict(self.model, batch, self.study, self.prior)
        if self.study.task.kind != "multilabel":
            return found
        return replace(found, probabilities=np.where(np.isnan(self.prior), np.nan, found.probabilities))


Local = LocalNetwork | Classical


def fit_local(study: Study, data: Batch, site: str) -> dict[str, Local]:
    """All models that a site can have alone: its network, the classical ones, and one of public scores only.

    Args:
        study: of the run.
        data: the site's training records.
        site: keys the draws of the network.
    """
    fitted: dict[str, Local] = {"local": fit_network(study, data, list(data.inputs), site)}
    fitted |= {f"{name}_local": fit_classical(study, data, name) for name in CLASSICAL}
    scores = [name for name in study.scores if name in data.inputs]
    return fitted | ({SCORE: fit_classical(study, data, "lr", scores)} if scores else {})


def out_of_fold(study: Study, data: Batch, folds: NDArray[np.int64], site: str) -> dict[str, NDArray[np.float64]]:
    """What local models say of the training records, each by models that did not see its patient: [R, classes].

    Args:
        study: of the run.
        data: the site's training records.
        folds: [P], of its patients.
        site: keys the draws.
    """
    found: dict[str, NDArray[np.float64]] = {}
    for fold in np.unique(folds):
        inside, outside = (torch.from_numpy(np.flatnonzero(rows)) for rows in (folds == fold, folds != fold))
        outside = outside if len(outside) else inside
        rows = torch.isin(data.patient, inside).numpy()
        for name, model in fit_local(study, data.of_patients(outside), site).items():
            empty = np.zeros((len(data), len(study.task.class_names)))
            said = model(data.of_patients(inside)).probabilities
            found.setdefault(name, empty)[rows] = np.nan_to_num(said, nan=0.5)  # of labels none of the others has
    return found


@dataclass(frozen=True, kw_only=True)
class Own:
    """What a site has alone.

    Attributes:
        models: by name, trained on all training records.
        out_of_fold: by name, what `out_of_fold` gives.
        fold: [R], in which fold each training record is there.
    """

    models: Mapping[str, Local]
    out_of_fold: Mapping[str, NDArray[np.float64]]
    fold: NDArray[np.int64]


def train_own(study: Study, cohort: Cohort) -> Own:
    """Train all that a site can have alone, and judge it on its training patients.

    Args:
        study: of the run; its budget makes no difference.
        cohort: the site's records.
    """
    training = cohort.training()
    folds = np.array([validation_fold(patient, study.evaluation) for patient in cohort.training_ids()])
    return Own(
        models=fit_local(study, training, cohort.site),
        out_of_fold=out_of_fold(study, training, folds, cohort.site),
        fold=folds[training.patient.numpy()],
    )


def keep(folder: RunFolder, models: Mapping[str, Local], card: Mapping[str, Any]) -> None:
    """Write the models into STATE/runs/<run>, for the site's own predictions.

    Args:
        folder: of the run.
        models: by the name of their file.
        card: of the site's federated model.
    """
    for name, model in models.items():
        if isinstance(model, LocalNetwork):
            folder.save_model(name, groups(model.model), {**card, "constants": model.model.constants.to_dict()})
        else:
            folder.save_own(f"{name}.safetensors", model.dump(card))
