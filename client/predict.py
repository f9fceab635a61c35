"""Predictions of a site's model for its own records; what they hold stays at the site."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gapweave.client.data import Cohort, load_cohort
from gapweave.client.sources.findings import Finding
from gapweave.client.state import read_model
from gapweave.shared.config import Site, Study
from gapweave.shared.config.base import parse
from gapweave.shared.constants import Constants
from gapweave.shared.errors import UsageError
from gapweave.shared.files import intact
from gapweave.shared.model import MultimodalModel, load_groups
from gapweave.shared.objective import probabilities
from gapweave.shared.schema import Batch, complete

CHUNK = 4096
"""Records that go through the model at once."""


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What the model says of each record.

    Attributes:
        probabilities: [R, classes]; NaN where nothing can be said.
        votes: [R, M, classes], of each modality alone; NaN where absent.
        weights: [R, M], shares in the decision; None when the fusion has none.
    """

    probabilities: NDArray[np.float64]
    votes: NDArray[np.float64]
    weights: NDArray[np.float64] | None


def predict(model: MultimodalModel, batch: Batch, study: Study, prior: Sequence[float]) -> Predictions:
    """Predict from all modalities that a record has.

    Args:
        model: of the site.
        batch: records.
        study: the model's.
        prior: [K] training prevalence at the site, given for a record without any modality; NaN where it is not known.
    """
    outputs = []
    with torch.no_grad():
        for start in range(0, len(batch), CHUNK):
            part = batch.rows(torch.arange(start, min(start + CHUNK, len(batch))))
            outputs.append(model(part.inputs, part.present, part.present))
    if not outputs:
        empty = np.zeros((0, len(study.task.class_names)))
        return Predictions(probabilities=empty, votes=empty[:, None], weights=None)
    kind = study.task.kind
    found = probabilities(torch.cat([output.logits for output in outputs]).cpu(), kind)
    votes = probabilities(torch.cat([output.modality_logits for output in outputs]).cpu(), kind)
    present = batch.present.cpu()
    nothing = ~present.any(1)
    fallback = torch.tensor(prior, dtype=found.dtype)
    fallback = torch.stack([1 - fallback[0], fallback[0]]) if kind == "binary" else fallback
    found = torch.where(nothing.unsqueeze(1), fallback, found)
    weights = outputs[0].weights
    return Predictions(
        probabilities=_array(found),
        votes=_array(torch.where(present.unsqueeze(-1), votes, torch.nan)),
        weights=None if weights is None else _array(torch.cat([_known(output.weights) for output in outputs])),
    )


def _known(weights: Tensor | None) -> Tensor:
    assert weights is not None
    return weights


def _array(tensor: Tensor) -> NDArray[np.float64]:
    return tensor.double().cpu().numpy()


@dataclass(frozen=True, kw_only=True)
class SiteModel:
    """A kept model with its card."""

    study: Study
    model: MultimodalModel
    card: dict[str, Any]

    def __call__(self, batch: Batch) -> Predictions:
        """What the model says of records."""
        return predict(self.model, batch, self.study, self.card["prior"])


def load_site_model(file: Path) -> SiteModel:
    """Read a model that `Participant.finish` kept.

    Raises:
        GapweaveError: when there is none.
    """
    groups, card = read_model(file)
    study = parse(Study, card["study"], str(file))
    model = MultimodalModel(study, card["modalities"], Constants.from_dict(card["constants"]))
    load_groups(model, groups)
    return SiteModel(study=study, model=model, card=card)


def find_model(run: Path, site: str, name: str) -> Path:
    """The file of a site's model in a run directory (RUN/sites/<site>), or in a hospital's STATE/runs/<run>.

    Raises:
        UsageError: when the folder is neither, or holds no run of that site.
    """
    if (run / f"{name}.safetensors").exists():
        return run / f"{name}.safetensors"
    state = run / "sites" / site
    setup = run / "checkpoint" / "simulation.json"
    if setup.exists():
        with intact(setup):
            state = run / json.loads(setup.read_text(encoding="utf-8"))["state"] / site
    found = sorted(state.glob(f"runs/*/{name}.safetensors"))
    if (run / "summary.json").exists():
        with intact(run / "summary.json"):
            identity = json.loads((run / "summary.json").read_text(encoding="utf-8"))["run"]
        found = [file for file in found if file.parent.name == identity]
    elif not state.resolve().is_relative_to(run.resolve()):
        found = []  # a state folder that outlives runs: which of its models is this one's, the run does not say yet
    if not found:
        kind, remedy = "model", "Give a finished run directory, or STATE/runs/<run> at the hospital"
        if name == "finetuned":
            kind, remedy = "fine-tuned model", "Sites fine-tune where the study sets training.finetune"
        raise UsageError(f"there is no {kind} of site {site!r}", where=str(run), remedy=remedy)
    return found[-1]


def predict_file(
    kept: SiteModel,
    predictor: Callable[[Batch], Predictions],
    site: Site,
    site_file: Path,
    data_dir: Path | None,
    out: Path,
    findings: list[Finding],
) -> int:
    """Write predictions.csv for all records of a site file; labels are not needed.

    What is odd about the data, a wrong unit say, is appended to `findings`. A modality that the site file does not name
    is one that no record has.

    Args:
        kept: the site's federated model, for its card.
        predictor: what predicts.
        site: the site file.
        site_file: its path.
        data_dir: folder of data sets.
        out: file to write.
        findings: appended to.

    Returns:
        The number of records.

    Raises:
        UsageError: when the file exists, or its folder does not.
        DataError: for a problem in the data.
    """
    if out.exists():
        raise UsageError("the output file exists", where=str(out), remedy="Give another --out")
    if not out.parent.is_dir():
        raise UsageError("there is no such folder", where=str(out.parent), remedy="Create it, or give another --out")
    cohort = load_cohort(kept.study, site, site_file=site_file, data_dir=data_dir, labels=False, findings=findings)
    held = torch.tensor([name in kept.card["modalities"] for name in kept.study.order])
    batch = cohort.batch
    usable = replace(complete(kept.study, batch), present=batch.present & held)
    if unnamed := [name for name in kept.card["modalities"] if name not in batch.inputs]:
        message = f"the model reads {', '.join(unnamed)}, which the site file does not name: no record has it"
        findings.append(Finding(id="modalities", status="warning", where=str(site_file), message=message))
    table(kept, cohort, usable, predictor(usable)).write_csv(out)
    return len(batch)


def table(kept: SiteModel, cohort: Cohort, batch: Batch, predictions: Predictions) -> Any:
    """The columns of predictions.csv as a polars frame."""
    import polars

    study, order = kept.study, kept.study.order
    present = batch.present.numpy()
    patterns = ["+".join(name for name, here in zip(order, row, strict=True) if here) for row in present]
    imputes = kept.model.fusion.reads_slots
    absent = ["+".join(name for name, here in zip(order, row, strict=True) if not here) for row in present]
    seen = set(kept.card["patterns"])
    columns: dict[str, Any] = {
        "record_id": cohort.record_ids,
        "patient_id": [cohort.patient_ids[at] for at in batch.patient.tolist()],
    }
    for at, name in enumerate(study.task.class_names):
        columns[f"p_{name}"] = polars.Series(predictions.probabilities[:, at]).fill_nan(None)
    columns["present"] = patterns
    columns["imputed"] = absent if imputes else [""] * len(batch)
    for at, name in enumerate(order):
        weights = predictions.weights
        columns[f"weight_{name}"] = [None] * len(batch) if weights is None else weights[:, at]
    for at, name in enumerate(order):
        columns[f"vote_{name}"] = _vote(predictions.votes[:, at], study)
    columns["unseen_pattern"] = [int(pattern not in seen) for pattern in patterns]
    return polars.DataFrame(columns, strict=False)


def _vote(votes: NDArray[np.float64], study: Study) -> list[Any]:
    """A modality's own answer: probability of class 1, or the class or labels that it favours."""
    names = study.task.class_names
    answers: list[Any] = []
    for row in votes:
        if np.isnan(row).any():
            answers.append(None)
        elif study.task.kind == "binary":
            answers.append(float(row[1]))
        elif study.task.kind == "multiclass":
            answers.append(names[int(row.argmax())])
        else:
            answers.append("+".join(name for name, value in zip(names, row, strict=True) if value >= 0.5))
    return answers
