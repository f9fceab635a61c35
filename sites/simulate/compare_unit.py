"""One unit of a comparison: simulate a study, judge its models and the baselines, keep rows and little else."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gapweave.client import app as client_app
from gapweave.client.classical import CLASSICAL
from gapweave.client.data import Cohort
from gapweave.client.joining import choose_models
from gapweave.client.local_models import Own, train_own
from gapweave.client.mixture import load_mixture
from gapweave.client.predict import load_site_model, predict
from gapweave.client.state import RunFolder
from gapweave.shared.config import Study
from gapweave.shared.metrics import exact_metrics
from gapweave.shared.rundir import RunDirectory
from gapweave.sites.simulate.attacks import bad_names
from gapweave.sites.simulate.baselines import fit_baselines
from gapweave.sites.simulate.compare_plan import Unit
from gapweave.sites.simulate.run import Setup, VirtualSite, load_sites, simulate

MODELS = (
    "federated",
    "federated_finetuned",
    "blend",
    "best",
    "own",
    "score_local",
    "local",
    "pooled",
    "lr_local",
    "lr_pooled",
    "gbm_local",
    "gbm_pooled",
)
"""Names of models in rows, in the order of tables. Of the joining check: blend; best, what `predict` would take; own,
the site's strongest own model; score_local."""

ROWS, SCORES = "rows.json", "scores.npz"
Row = dict[str, Any]
ByModel = dict[str, dict[str, NDArray[np.float64]]]
"""Model -> site -> [R, classes]."""


class Silent:
    """A `Watcher` that shows nothing."""

    def prepared(self, sites: int, rounds: int, done: int) -> None:
        """Nothing."""

    def replied(self, number: int, site: str) -> None:
        """Nothing."""

    def round_done(self, number: int, auroc: float | None) -> None:
        """Nothing."""

    def baseline(self, name: str) -> None:
        """Nothing."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """A site's held-out records and what each model says of them.

    Attributes:
        record: [R] positions of the records in the site's cohort.
        patient: [R] positions of their patients in it.
        target: [R, K].
        known: [R, K], which targets are known.
        models: by name, [R, classes].
        fold: [R], as of `paired.Truth`.
    """

    record: NDArray[np.int64]
    patient: NDArray[np.int64]
    target: NDArray[np.float64]
    known: NDArray[np.bool_]
    models: Mapping[str, NDArray[np.float64]]
    fold: NDArray[np.int64] | None = None


class Baselines:
    """Held-out scores of baselines, and what sites have alone, fitted once for all units that would fit the same.

    Args:
        names: of `BASELINES`.
        joining: whether sites choose between the federated model and their own.
    """

    def __init__(self, names: tuple[str, ...], joining: bool = False) -> None:
        self._names = names
        self._joining = joining
        self._known: dict[str, ByModel] = {}
        self._own: dict[str, Own] = {}

    def chosen(self, study: Study, site: VirtualSite, run: RunFolder) -> dict[str, NDArray[np.float64]]:
        """Held-out scores of the models among which the joining check of a site chooses; none without it."""
        if not self._joining:
            return {}
        cohort = site.participant.cohort
        choices = choose_models(study, cohort, run, self._alone(study, cohort))
        names = {"blend": "blend", "best": choices.used, "own": choices.strongest, "score_local": "score_local"}
        return {
            model: load_mixture(run.path, choices.mixtures[name], study)(cohort.testing()).probabilities
            for model, name in names.items()
            if name in choices.mixtures
        }

    def _alone(self, study: Study, cohort: Cohort) -> Own:
        key = _baseline_key("own", study, [cohort.site])
        if key not in self._own:
            self._own[key] = train_own(study, cohort)
        return self._own[key]

    def scores(self, study: Study, cohorts: Mapping[str, Cohort]) -> ByModel:
        """Scores of all baselines on the sites' held-out records."""
        result: ByModel = {}
        for name in self._names:
            key = _baseline_key(name, study, list(cohorts))
            if key not in self._known:
                own = {site: self._alone(study, at).models for site, at in cohorts.items()} if self._joining else None
                fitted = fit_baselines(study, cohorts, [name], alone=own)
                self._known[key] = {
                    model: {site: at(cohorts[site].testing()).probabilities for site, at in by_site.items()}
                    for model, by_site in fitted.items()
                }
            result |= self._known[key]
        return result


def _baseline_key(name: str, study: Study, sites: list[str]) -> str:
    """What a baseline's scores depend on: no noise, no rule; a classical model has no network either."""
    content = study.model_dump(mode="json")
    unread = {"name", "privacy", "sharing", "aggregation"}
    if name in CLASSICAL:
        unread |= {"model", "scheme", "training"}
        steps = {}
    else:  # `fit_network` is a federation of one, whose gradients may be clipped
        server = content["aggregation"].items()
        steps = {key: value for key, value in server if key.startswith(("server_", "average_"))}
        steps |= {key: content["privacy"][key] for key in ("enabled", "max_grad_norm", "clipping")}
    return json.dumps([name, sites, steps, {key: value for key, value in content.items() if key not in unread}])


def run_unit(unit: Unit, setup: Setup, folder: Path, baselines: Baselines) -> None:
    """Simulate a unit in its folder; what an interrupted attempt left there is removed first.

    Args:
        unit: what to run.
        setup: of the comparison; unless its state outlives it, the virtual sites' state goes into the unit's folder.
        folder: of the unit. `rows.json` in it, written last, marks it as done.
        baselines: shared by the comparison's units.

    Raises:
        GapweaveError: as the simulation raises it.
    """
    started = time.monotonic()
    if folder.exists():
        shutil.rmtree(folder)
    setup = setup if setup.anchored else replace(setup, state=folder / "sites")
    try:
        sites = load_sites(unit.study, setup)
        directory = RunDirectory.create(folder, unit.study)
        summary = simulate(unit.study, setup, directory, Silent(), sites)
        bad = bad_names(unit.study, [site.site.name for site in sites if site.error is None])
        usable = [site for site in sites if site.error is None and site.site.name not in bad]
        fitted = baselines.scores(unit.study, {site.site.name: site.participant.cohort for site in usable})
        scores = {site.site.name: score_site(unit.study, site, summary["run"], fitted, baselines) for site in usable}
    finally:
        client_app.forget()
    epsilon = {name: (row["privacy"] or {}).get("epsilon") for name, row in summary["sites"].items()}
    if unit.fold is not None:
        save_scores(folder / SCORES, scores)
    for bulky in (directory.sites, directory.checkpoint, directory.model):
        shutil.rmtree(bulky, ignore_errors=True)
    rows = rows_of(unit.study, scores, epsilon, unit.seed, unit.fold)
    left_out = {
        name: row["status"] + (f", {row['reason']}" if row["reason"] else "")
        for name, row in summary["sites"].items()
        if row["status"] != "ok"
    }
    seconds = round(time.monotonic() - started, 3)
    directory.write_json(ROWS, {"rows": rows, "epsilon": epsilon, "left_out": left_out, "seconds": seconds})


def score_site(study: Study, site: VirtualSite, run: str, fitted: ByModel, baselines: Baselines) -> Scores:
    """Judge every model on a site's held-out records."""
    cohort, name = site.participant.cohort, site.site.name
    test, prior = cohort.testing(), cohort.training().prevalence()
    folder = RunFolder(site.participant.state, run)
    models = {}
    for model, file in (("federated", "model"), ("federated_finetuned", "finetuned")):
        path = folder.path / f"{file}.safetensors"
        if path.exists():
            models[model] = predict(load_site_model(path).model, test, study, prior).probabilities
    models |= {model: by_site[name] for model, by_site in fitted.items()}
    models |= baselines.chosen(study, site, folder)
    record = held_out_records(cohort)
    return Scores(
        record=record,
        patient=cohort.batch.patient.numpy()[record],
        target=test.target.double().numpy(),
        known=test.label_mask.numpy(),
        models=models,
    )


def held_out_records(cohort: Cohort) -> NDArray[np.int64]:
    """Positions in the cohort of the records of `cohort.testing()`."""
    batch = cohort.batch
    usable = torch.zeros(batch.patients, dtype=torch.bool)
    usable[batch.patient[batch.weight > 0]] = True
    return (usable & cohort.test)[batch.patient].nonzero()[:, 0].numpy()


def save_scores(file: Path, scores: Mapping[str, Scores]) -> None:
    """Write scores of all sites. They are patients' values: the file stays inside the unit's folder."""
    arrays: dict[str, NDArray[Any]] = {}
    for site, of in scores.items():
        arrays |= {f"{site}/record": of.record, f"{site}/patient": of.patient}
        arrays |= {f"{site}/target": of.target, f"{site}/known": of.known}
        arrays |= {f"{site}/model/{name}": values for name, values in of.models.items()}
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def load_scores(file: Path) -> dict[str, Scores]:
    """What `save_scores` wrote, by site."""
    with np.load(file) as arrays:
        sites = dict.fromkeys(key.split("/")[0] for key in arrays)
        return {
            site: Scores(
                record=arrays[f"{site}/record"],
                patient=arrays[f"{site}/patient"],
                target=arrays[f"{site}/target"],
                known=arrays[f"{site}/known"],
                models={
                    key.removeprefix(f"{site}/model/"): arrays[key]
                    for key in arrays
                    if key.startswith(f"{site}/model/")
                },
            )
            for site in sites
        }


def join_folds(folds: list[dict[str, Scores]]) -> dict[str, Scores]:
    """Out-of-fold scores by site, of the sites and models that every fold has."""
    return {
        site: Scores(
            record=np.concatenate([fold[site].record for fold in folds]),
            patient=np.concatenate([fold[site].patient for fold in folds]),
            target=np.concatenate([fold[site].target for fold in folds]),
            known=np.concatenate([fold[site].known for fold in folds]),
            fold=np.concatenate([np.full(len(fold[site].record), at) for at, fold in enumerate(folds)]),
            models={
                name: np.concatenate([fold[site].models[name] for fold in folds])
                for name in folds[0][site].models
                if all(name in fold[site].models for fold in folds)
            },
        )
        for site in folds[0]
        if all(site in fold for fold in folds)
    }


def rows_of(
    study: Study, scores: Mapping[str, Scores], epsilon: Mapping[str, float | None], seed: int, fold: int | None
) -> list[Row]:
    """Rows of all models and sites, without their cell.

    Args:
        study: gives the kind of the task.
        scores: by site.
        epsilon: spent, by site; None without privacy.
        seed: for the rows.
        fold: for the rows.
    """
    kind = study.task.kind
    return [
        {
            "model": model,
            "seed": seed,
            "fold": fold,
            "site": site,
            "n_test": int(of.known.any(1).sum()),
            "positives": int(of.target[of.known].sum()) if kind == "binary" else None,
            "metrics": exact_metrics(of.models[model], of.target, of.known, kind, of.fold),
            "epsilon": epsilon[site] if model.startswith("federated") else None,
        }
        for model in MODELS
        for site, of in scores.items()
        if model in of.models
    ]
