"""What a user would pick instead: each site alone, all data pooled, logistic regression, gradient boosting.

All of them train without privacy and see what the federated model sees: the same features of the same training
patients. Nothing here is tuned on the test patients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from gapweave.client.classical import fit_classical
from gapweave.client.data import Cohort
from gapweave.client.local_models import Local, LocalNetwork, fit_network
from gapweave.client.mixture import Predictor
from gapweave.client.predict import Predictions
from gapweave.shared.config import Study
from gapweave.shared.schema import Batch, complete

BASELINES = ("local", "pooled", "lr", "gbm")
"""Values of `--baselines`; lr and gbm are fitted both locally and pooled."""


def local_network(study: Study, cohort: Cohort) -> LocalNetwork:
    """The same network, trained at one site alone."""
    training = cohort.training()
    return fit_network(study, training, list(training.inputs), cohort.site)


def pooled_network(study: Study, cohorts: Mapping[str, Cohort]) -> Predictor:
    """The same network, trained on all sites' data in one place; its batches are as large as a round's of all."""
    pooled = pool(study, [cohort.training() for cohort in cohorts.values()])
    training = study.training.model_copy(update={"batch": study.training.batch * len(cohorts)})
    network = fit_network(study.model_copy(update={"training": training}), pooled, list(study.order), "pooled")
    return lambda batch: network(complete(study, batch))


def pool(study: Study, batches: list[Batch]) -> Batch:
    """All batches as one; a site's missing modalities are absent rows."""
    whole = [complete(study, batch) for batch in batches]
    offsets = np.cumsum([0, *[batch.patients for batch in batches]])
    return Batch(
        inputs={name: torch.cat([batch.inputs[name] for batch in whole]) for name in study.order},
        present=torch.cat([batch.present for batch in whole]),
        target=torch.cat([batch.target for batch in whole]),
        label_mask=torch.cat([batch.label_mask for batch in whole]),
        patient=torch.cat([batch.patient + int(at) for batch, at in zip(whole, offsets[:-1], strict=True)]),
        weight=torch.cat([batch.weight for batch in whole]),
        patients=int(offsets[-1]),
    )


def fit_baselines(
    study: Study,
    cohorts: Mapping[str, Cohort],
    names: list[str],
    progress: Callable[[str], None] = lambda name: None,
    alone: Mapping[str, Mapping[str, Local]] | None = None,
) -> dict[str, dict[str, Predictor]]:
    """All baselines asked for: model name -> site -> predictor.

    Args:
        study: of the run.
        cohorts: by site.
        names: of `BASELINES`.
        progress: told the name of each fit.
        alone: by site, what `fit_local` gave: these models are not trained again.
    """
    result: dict[str, dict[str, Predictor]] = {}
    if "local" in names:
        result["local"] = {}
        for site, cohort in cohorts.items():
            progress(f"local {site}")
            result["local"][site] = alone[site]["local"] if alone else local_network(study, cohort)
    if "pooled" in names:
        progress("pooled")
        result["pooled"] = dict.fromkeys(cohorts, pooled_network(study, cohorts))
    for name in ("lr", "gbm"):
        if name in names:
            progress(name)
            result |= _fit_classical_both(study, cohorts, name, alone)
    return result


def _fit_classical_both(
    study: Study, cohorts: Mapping[str, Cohort], name: str, alone: Mapping[str, Mapping[str, Local]] | None
) -> dict[str, dict[str, Predictor]]:
    local: dict[str, Predictor] = {
        site: alone[site][f"{name}_local"] if alone else fit_classical(study, cohort.training(), name)
        for site, cohort in cohorts.items()
    }
    together = fit_classical(study, pool(study, [cohort.training() for cohort in cohorts.values()]), name)

    def on_all(batch: Batch) -> Predictions:
        return together(complete(study, batch))

    return {f"{name}_local": local, f"{name}_pooled": dict.fromkeys(cohorts, on_all)}
