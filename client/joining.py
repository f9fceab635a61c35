"""The joining check: is this site better off than alone, and with which of its models should it predict?

Everything here is computed on the site's own patients without noise. It is for the site's own people: it goes into
STATE/runs/<run>, no code that answers a server imports this module, and no file that it writes is read by one.

What is chosen (the strongest local model, the shares of a blend) is chosen on the training patients, out of fold where
the site trains the model itself; what is judged is judged on the held-out patients, whom no model has seen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gapweave.client.calibration import Calibration, calibrate, enough, log_loss
from gapweave.client.data import Cohort
from gapweave.client.local_models import SCORE, Own, keep, train_own
from gapweave.client.mixture import Weights, base_of, load_mixture, mix
from gapweave.client.predict import load_site_model
from gapweave.client.state import RunFolder
from gapweave.shared.config import Study
from gapweave.shared.joining import JOINED, JOINING_FILE, guessing, verdict
from gapweave.shared.judging import FEWEST
from gapweave.shared.metrics import exact_metrics
from gapweave.shared.paired import Bootstrap, Truth, interval
from gapweave.shared.report.joining_page import joining_page

Array = NDArray[np.float64]

SHARES = tuple(tenth / 10 for tenth in range(11))
"""Shares of the second model of a blend among which the log-loss chooses."""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What the site chose on its training patients.

    Attributes:
        strongest: key of its best local model.
        used: key of the model that `predict --model best` takes: federated, finetuned, blend, or the strongest local.
        mixtures: by key, kept models with their shares.
        said: by key, [R, classes] of the training records, by local models that did not see the patient.
    """

    strongest: str
    used: str
    mixtures: Mapping[str, Weights]
    said: Mapping[str, Array]


def joining_check(study: Study, cohort: Cohort, run: RunFolder) -> dict[str, Any]:
    """Train the local models, choose, judge, and write joining.json and report.html into the run's folder.

    Args:
        study: of the run.
        cohort: the site's records.
        run: the folder of a run that the site finished.

    Returns:
        The content of joining.json.

    Raises:
        GapweaveError: when the run left no model here.
    """
    choices = choose_models(study, cohort, run, train_own(study, cohort))
    training, test = cohort.training(), cohort.testing()
    truth = Truth.of(test, study.task.kind)
    scored = {
        key: load_mixture(run.path, shares, study)(test).probabilities for key, shares in choices.mixtures.items()
    }
    learnt = Truth.of(training, study.task.kind)
    calibrations = {key: calibrate(choices.said[key], learnt) for key in scored if enough(learnt)}
    content = {
        "site": cohort.site,
        "run": run.path.name,
        "study": study.name,
        "study_sha256": study.sha256,
        "training_patients": training.patients,
        "patients": truth.patients,
        "rarer": truth.rarer() if truth.patients else 0,
        "outputs": {"judged": sum(side >= FEWEST for side in truth.sides), "all": len(truth.sides)},
        "strongest": choices.strongest,
        "used": choices.used,
        "mixtures": choices.mixtures,
        "gate": base_of(run.path)[1],
        "calibrations": {key: calibration.to_dict() for key, calibration in calibrations.items()},
        **_judged(scored, truth, choices, calibrations),
    }
    run.save_own(JOINING_FILE, json.dumps(content, indent=1).encode())
    run.save_own("report.html", joining_page(content).encode())
    return content


def choose_models(study: Study, cohort: Cohort, run: RunFolder, own: Own) -> Choices:
    """The strongest local model by AUROC, and its share in a blend by log-loss, on training patients.

    The federated model was trained on them, among many others or under noise; the local ones, out of fold, were not.
    The blend so leans to the federated model: the more, the larger this site's part of the patients is and the less
    noise there was. What that costs is judged on held-out patients, and `predict` says where it is worse than alone.

    Args:
        study: of the run.
        cohort: the site's records.
        run: the folder of a run that the site finished; the site's own models are kept there.
        own: of `train_own`.

    Raises:
        GapweaveError: when the run left no model here.
    """
    keep(run, own.models, load_site_model(run.path / "model.safetensors").card)
    base, _ = base_of(run.path)
    training = cohort.training()
    truth, alone = Truth.of(training, study.task.kind, own.fold), dict(own.out_of_fold)
    mixtures: dict[str, Weights] = {"federated": {"model": 1.0}}
    if (run.path / "finetuned.safetensors").exists():
        mixtures["finetuned"] = {"finetuned": 1.0}
    mixtures |= {name: {name: 1.0} for name in alone if name != SCORE}
    strongest = max((name for name in alone if name != SCORE), key=lambda name: _strength(alone[name], truth))
    if SCORE in alone:
        share = _share(alone[strongest], alone[SCORE], truth)
        mixtures["score_local"] = {strongest: 1 - share, SCORE: share}
        alone["score_local"] = mix([alone[strongest], alone[SCORE]], [1 - share, share], truth.kind)
        strongest = "score_local" if share > 0 else strongest
    joined: dict[str, Array] = {
        key: load_mixture(run.path, mixtures[key], study)(training).probabilities
        for key in ("federated", "finetuned")
        if key in mixtures
    }
    share = _share(joined[base], alone[strongest], truth)
    (name,) = mixtures[base]
    local = {of: share * part for of, part in mixtures[strongest].items()}
    mixtures["blend"] = {name: 1 - share, **local}
    blend = mix([joined[base], alone[strongest]], [1 - share, share], truth.kind)
    used = {0.0: base, 1.0: strongest}.get(share, "blend")
    return Choices(strongest=strongest, used=used, mixtures=mixtures, said={**alone, **joined, "blend": blend})


def _strength(probabilities: Array, truth: Truth) -> tuple[float, float]:
    """AUROC, by which verdicts are given; then the log-loss, where no AUROC is defined."""
    auroc = exact_metrics(probabilities, truth.target, truth.known, truth.kind, truth.fold)["auroc"]
    return 0.0 if auroc is None else auroc, -log_loss(probabilities, truth)


def _share(ours: Array, other: Array, truth: Truth) -> float:
    """The second model's share in a blend: that of the least log-loss; none where too few patients can tell.

    Each model counts as if its logits had the slope that suits the site, and so does each blend: else a model under a
    strong ridge, whose logits are all small, would lose its share to one that is merely louder.
    """
    if truth.rarer() < FEWEST:
        return 0.0
    first, second = calibrate(ours, truth).slope, calibrate(other, truth).slope

    def loss(part: float) -> float:
        blend = mix([ours, other], [(1 - part) * first, part * second], truth.kind)
        return log_loss(calibrate(blend, truth)(blend, truth.kind), truth)

    part = min(SHARES, key=loss)
    return float(part * second / ((1 - part) * first + part * second))


def _judged(
    scored: Mapping[str, Array], truth: Truth, choices: Choices, calibrations: Mapping[str, Calibration]
) -> dict[str, Any]:
    """AUROCs on the held-out patients, and differences to the strongest local model, paired by patient."""
    empty = truth.patients == 0
    bootstrap = None if empty else Bootstrap(truth)
    rarer = 0 if empty else truth.rarer()
    nothing = np.full(2, np.nan)
    found = {key: nothing if bootstrap is None else bootstrap.aurocs(values) for key, values in scored.items()}
    strongest = found[choices.strongest]
    intervals = {key: interval(values, rarer) for key, values in found.items()}
    differences = {key: values - strongest for key, values in found.items()}
    models = {
        key: {
            "auroc": _number(found[key][0]),
            "interval": intervals[key],
            "difference": _number(difference[0]),
            "difference_interval": interval(difference, rarer),
            "verdict": verdict(interval(difference, rarer), rarer) if key in JOINED else None,
            "ece": _error(scored[key], truth),
            "ece_calibrated": _error(calibrations[key](scored[key], truth.kind), truth)
            if key in calibrations
            else None,
        }
        for key, difference in differences.items()
    }
    return {"models": models, "guessing": guessing(intervals[choices.used], intervals[choices.strongest])}


def _error(probabilities: Array, truth: Truth) -> float | None:
    return exact_metrics(probabilities, truth.target, truth.known, truth.kind)["ece"]


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
