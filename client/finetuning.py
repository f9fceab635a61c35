"""Private fine-tuning after the last upload, and the site's own answer to whether it helped.

The fine-tuned copy is post-processing of noised gradients, as every round is, and it stays at the site.

*A fifth of the training patients takes no part* (the first validation fold, by a keyed hash of the patient): they judge
it. Their data enter neither the steps' sums nor the sampling, so each of the others is drawn with the plan's own rate
and the charged event holds for all; the denominator shrinks by the same public fifth. They were trained on in the
rounds, by the model that the copy is compared with: that speaks against the copy, if at all.

*With `aggregation.shrink`* only that share of the change is kept which its noise does not explain, as of the federated
model itself: a few steps of one site at a small budget are mostly noise.

*The gate* compares each patient's log-loss under both models, and keeps the copy for predictions only when the mean
gain is above one standard error of itself (Breiman et al. 1984, section 3.4.3). It is computed without noise: its
result stays in the copy's card, and nothing that answers a server reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gapweave.client.predict import predict
from gapweave.client.sources.split import validation_fold
from gapweave.client.training import Sgd, Step, train
from gapweave.shared.model import MultimodalModel
from gapweave.shared.paired import Truth, losses
from gapweave.shared.privacy.plan import VALIDATION_FOLDS, noise_of_steps
from gapweave.shared.schema import Batch
from gapweave.shared.shrinkage import share_kept

FEWEST_TO_JUDGE = 5
"""Validation patients of the rarer class without whom the federated model stays in use."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Whether the fine-tuned copy is used for predictions.

    Attributes:
        kept: whether it is.
        why: in words.
        patients: validation patients.
        gain: federated minus fine-tuned log-loss, mean over them; None without any.
        error: standard error of that mean; None with fewer than two.
    """

    kept: bool
    why: str
    patients: int
    gain: float | None
    error: float | None


def fine_tune(model: MultimodalModel, data: Batch, ids: Sequence[str], step: Step) -> Gate:
    """Take the plan's steps of fine-tuning; the model changes in place.

    L2-SP (Li, Grandvalet and Davoine 2018, arXiv 1802.01483): beside the study's own objective, half the pull times
    the squared distance from the parameters that it starts with; it reads parameters only and so costs no privacy.

    Args:
        model: the federated one of the site.
        data: training patients, with the model's features taken.
        ids: of these patients.
        step: as the rounds take it, with the event of fine-tuning charged.

    Returns:
        What the site's validation patients say of it.
    """
    study, plan = step.study, step.plan
    validating = np.array([validation_fold(patient, study.evaluation) == 0 for patient in ids], np.bool_)
    learning, judging = (_of(data, rows) for rows in (~validating, validating))
    before = predict(model, judging, study, data.prevalence()).probabilities
    fewer = replace(plan, n_hat=max(1, round(plan.n_hat * (1 - 1 / VALIDATION_FOLDS))))
    change = {"lr": study.training.finetune_lr or study.training.lr, "proximal": study.training.finetune_pull}
    tuning = study.model_copy(update={"training": study.training.model_copy(update=change)})
    start = {name: value.detach().clone() for name, value in model.named.items()}
    step = replace(step, study=tuning, plan=fewer)
    train(model, learning, step, Sgd(tuning, {}, start), plan.finetune_steps)
    if study.aggregation.shrink:
        _shrink(model, start, step)
    return judge(
        before, predict(model, judging, study, data.prevalence()).probabilities, Truth.of(judging, study.task.kind)
    )


def _shrink(model: MultimodalModel, start: Mapping[str, Tensor], step: Step) -> None:
    """Keep of the change what its noise does not explain; every parameter got the same noise at every step."""
    plan = step.plan
    of_a_step = plan.noise_multiplier * step.engine.sensitivity / (plan.sample_rate * plan.n_hat)
    sd = noise_of_steps(step.study, plan.finetune_steps, of_a_step)
    numbers = sum(value.numel() for value in start.values())
    square = sum(float((value.detach() - start[name]).double().square().sum()) for name, value in model.named.items())
    kept = share_kept(square, numbers * sd**2, numbers)
    with torch.no_grad():
        for name, value in model.named.items():
            value.lerp_(start[name], 1 - kept)


def _of(data: Batch, patients: NDArray[np.bool_]) -> Batch:
    return data.of_patients(torch.from_numpy(patients.nonzero()[0]).to(data.patient.device))


def judge(before: NDArray[np.float64], after: NDArray[np.float64], truth: Truth) -> Gate:
    """Compare two models on validation patients.

    Args:
        before: [R, classes], probabilities of the federated model.
        after: [R, classes], of the fine-tuned one.
        truth: of the records.
    """
    gains = losses(before, truth) - losses(after, truth)
    gains = gains[~np.isnan(gains)]
    count = len(gains)
    gain = float(gains.mean()) if count else None
    error = float(gains.std(ddof=1) / np.sqrt(count)) if count > 1 else None
    if gain is None or error is None or truth.rarer() < FEWEST_TO_JUDGE:
        few = f"too few validation patients to judge it ({count}, {truth.rarer()} of the rarer class)"
        return Gate(kept=False, why=few, patients=count, gain=gain, error=error)
    kept = gain > error
    why = f"its log-loss is {'' if gain > 0 else 'not '}lower: by {gain:.4f}, standard error {error:.4f}"
    return Gate(kept=kept, why=why, patients=count, gain=gain, error=error)
