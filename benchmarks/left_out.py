"""A hospital that took no part: how well does the others' model predict for its patients? Used by results.py."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

from recipes import EICU, PLAIN, SITES

STUDY = SITES / "eicu_demo" / "study.yaml"
WORDS = {"federated": "the others' federated model", "lr": "logistic regression on the others' pooled data"}


def left_out(out: Path, data: Path | None, *, smoke: bool) -> str:
    """Leave out each site of the eICU stay once, without privacy, and tabulate.

    Args:
        out: folder of the results; what is done is kept there.
        data: folder of data sets.
        smoke: two rounds and two sites.
    """
    from gapweave.shared.config import load_study

    overrides = {**PLAIN, **EICU, "evaluation.test_fraction": 0.0, **({"training.rounds": 2} if smoke else {})}
    study = load_study(STUDY, overrides)
    files = sorted((STUDY.parent / "sites").glob("*.yaml"))
    found = {
        file.stem: _one(study, files, file, data, out / "left-out") for file in files[: 2 if smoke else len(files)]
    }
    lines = ["| left out | patients | " + " | ".join(WORDS.values()) + " |", "| --- | --: | --: | --: |"]
    lines += [
        f"| {name} | {row['patients']} | {_cell(row['federated'])} | {_cell(row['lr'])} |"
        for name, row in found.items()
    ]
    means = [fmean(row[key] for row in found.values() if row[key] is not None) for key in WORDS]
    return "\n".join([*lines, "| **mean** | | " + " | ".join(f"**{mean:.3f}**" for mean in means) + " |"])


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _one(study: Any, files: list[Path], alone: Path, data: Path | None, out: Path) -> dict[str, Any]:
    """AUROCs at one site of models that have not seen it."""
    from gapweave.client import app as client_app
    from gapweave.client.classical import fit_classical
    from gapweave.client.data import load_cohort
    from gapweave.client.mixture import Predictor
    from gapweave.client.predict import predict
    from gapweave.client.state import to_tensors
    from gapweave.shared import tensorfile
    from gapweave.shared.config import load_site
    from gapweave.shared.metrics import exact_metrics
    from gapweave.shared.model import MultimodalModel, groups, load_groups
    from gapweave.shared.rundir import RunDirectory
    from gapweave.sites.simulate.baselines import complete, pool
    from gapweave.sites.simulate.compare_unit import Silent
    from gapweave.sites.simulate.run import Setup, load_sites, simulate

    folder = out / alone.stem
    kept = folder / "left_out.json"
    if kept.exists():
        row: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return row
    setup = Setup(sites=tuple(file for file in files if file != alone), data=data, state=folder / "sites")
    try:
        sites = load_sites(study, setup)
        directory = RunDirectory.create(folder, study)
        simulate(study, setup, directory, Silent(), sites)
        others = [site.participant.cohort.training() for site in sites]
    finally:
        client_app.forget()
    batch = load_cohort(study, load_site(alone), site_file=alone, data_dir=data).training()
    shared, _ = tensorfile.parse((directory.model / "shared.safetensors").read_bytes())
    model = MultimodalModel(study, list(batch.inputs))
    load_groups(model, to_tensors({name: part for name, part in shared.items() if name in groups(model)}))
    pooled = fit_classical(study, pool(study, others), "lr")
    models: dict[str, Predictor] = {
        "federated": lambda records: predict(model, records, study, records.prevalence()),
        "lr": lambda records: pooled(complete(study, records)),
    }
    aurocs = {
        name: exact_metrics(
            of(batch).probabilities, batch.target.double().numpy(), batch.label_mask.numpy(), study.task.kind
        )["auroc"]
        for name, of in models.items()
    }
    row = {"patients": batch.patients, **aurocs}
    kept.write_text(json.dumps(row), encoding="utf-8")
    return row
