"""Part (e) of an audit: who is sampled, by which numbers, under which draws, and when it was charged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special, stats

from gapweave.client.audit_provenance import Rehearsal, Round
from gapweave.client.audit_sensitivity import SLACK
from gapweave.client.audit_site import RUN, CanarySite, Finding, Scene, Scripted, Watched, finding, joined
from gapweave.client.audit_tally import ALPHA
from gapweave.client.training import Sgd, train
from gapweave.shared.model import MultimodalModel
from gapweave.shared.privacy.draws import SeededDraws
from gapweave.shared.schema import Batch

SAMPLES = 1500
"""Steps over which inclusion is counted."""


def record(scene: Scene, rehearsal: Rehearsal) -> Finding:
    """Who is sampled, by which numbers, under which draws, and when it was charged."""
    faults = [
        *(fault for one in rehearsal.rounds for fault in _charge(scene, rehearsal.site, one)),
        *_inclusion(scene),
        *_public_numbers(scene),
        *_secret_draws(scene),
    ]
    return finding("record", faults, {"samples": float(SAMPLES), "sample_rate": scene.plan.sample_rate})


def _charge(scene: Scene, site: CanarySite, one: Round) -> Iterator[str]:
    event, plan = one.event, scene.plan
    if event is None:
        yield "no event was charged for a round"
        return
    if not all(one.charged_before):
        yield "the engine worked on data before the event was in the ledger"
    if len(one.charged_before) != event.steps:
        yield f"{len(one.charged_before)} steps were taken, {event.steps} charged"
    if not site.learner.engine.sensitivity <= event.max_grad_norm * (1 + SLACK):
        yield "the engine declares a larger sensitivity than the event"
    declared = (plan.noise_multiplier, plan.sample_rate, plan.max_grad_norm, plan.n_hat)
    if (event.noise_multiplier, event.sample_rate, event.max_grad_norm, event.n_hat) != declared:
        yield "the charged event is not the plan's"
    if one.state.event != event.to_dict():
        yield "the reply does not carry the event that was charged"


class _NoOptimizer(Sgd):
    """Leaves the model as it is."""

    def step(self, model: MultimodalModel, gradient: object) -> None:
        """Nothing."""


def _inclusion(scene: Scene) -> Iterator[str]:
    """Patients enter independently, with probability q, with all of their records; also a patient who is alone."""
    lone = scene.patients.of_patients(torch.tensor([0], device=scene.patients.patient.device))
    for data in (_named(scene.patients), _named(lone)):
        yield from _entered(scene, data)


def _entered(scene: Scene, data: Batch) -> Iterator[str]:
    watched = Watched(None)
    learner = scene.participant("inclusion").learner
    train(learner.model, data, scene.step(watched, learner.real_draws()), _NoOptimizer(scene.study, {}), SAMPLES)
    records = Counter(data.patient.tolist())
    entered = np.zeros((SAMPLES, data.patients))
    for at, batch in enumerate(watched.batches[:SAMPLES]):
        who = Counter(batch.target[:, 0].int().tolist())
        if any(count != records[patient] for patient, count in who.items()):
            yield "a patient was sampled without all of the patient's records"
            return
        entered[at, list(who)] = 1
    yield from inclusion_faults(entered, scene.plan.sample_rate)


def _named(batch: Batch) -> Batch:
    """The same patients, told apart by their target."""
    return replace(batch, target=batch.patient.float().unsqueeze(1).expand_as(batch.target))


def inclusion_faults(entered: NDArray[np.float64], rate: float) -> Iterator[str]:
    """What a table of who entered each step says against Poisson sampling.

    Args:
        entered: [T, P] of 0 and 1.
        rate: q.
    """
    steps, patients = entered.shape
    low, high = stats.binom.ppf([ALPHA / patients, 1 - ALPHA / patients], steps, rate)
    counts = entered.sum(0)
    if not ((low <= counts) & (counts <= high)).all():
        yield f"patients enter at rates from {counts.min() / steps:.3g} to {counts.max() / steps:.3g}, not {rate:.3g}"
    one = rate * (1 - rate)
    if one == 0:
        return
    low, high = size_spread(patients, rate, steps)
    squares = float(np.square(entered.sum(1) - patients * rate).sum())
    if not low <= squares <= high:
        yield f"the variance of batch sizes is {squares / steps / patients / one:.3g} of that of Poisson sampling"
    # Of disjoint pairs of steps, who entered both is a binomial count; odd and even pairs are one count each.
    for first in (0, 1):
        pairs = (steps - first) // 2
        here, there = entered[first : first + 2 * pairs : 2], entered[first + 1 : first + 2 * pairs : 2]
        low, high = stats.binom.ppf([ALPHA / 4, 1 - ALPHA / 4], pairs * patients, rate**2)
        if not low <= float((here * there).sum()) <= high:
            yield "who enters a step depends on the step before"
            return


def size_spread(patients: int, rate: float, steps: int) -> tuple[float, float]:
    """Bounds that the summed squared deviations of batch sizes leave with probability below `ALPHA`.

    Chernoff's bound with the exact law of one size: at small rates a normal approximation fails by far.
    """
    sizes = np.arange(patients + 1)
    mass = stats.binom.logpmf(sizes, patients, rate)
    squares = np.square(sizes - patients * rate)
    tilts = np.logspace(-4, 1, 200) / (patients * rate * (1 - rate) + 1)
    need = np.log(2 / ALPHA)
    high = min((steps * special.logsumexp(mass + tilt * squares) + need) / tilt for tilt in tilts)
    low = max((-steps * special.logsumexp(mass - tilt * squares) - need) / tilt for tilt in tilts)
    return float(low), float(high)


def _public_numbers(scene: Scene) -> Iterator[str]:
    """One patient more changes neither the plan, nor q, nor any denominator."""
    more = joined(scene.patients, scene.canaries((1,), seed=21))
    plans, releases = [], []
    for name, batch in (("fewer", scene.patients), ("more", more)):
        plans.append(scene.participant(name, batch).prepare(RUN).plan)
        for level, everyone in _around(scene.plan.sample_rate):
            watched = Watched(None)
            step = scene.step(watched, Scripted(SeededDraws("audit"), level))
            releases.append(step.gradient(batch)["none"])
            if watched.batches[-1].patients != (batch.patients if everyone else 0):
                yield "patients are sampled at another rate than the event's"
    if plans[0] != plans[1]:
        yield "one patient more changes the plan"
    if not all(torch.equal(releases[0], other) for other in releases):
        yield "a denominator depends on who is there"


def _around(rate: float) -> list[tuple[float, bool]]:
    """Draws just below q, for which everyone enters, and just above, for which nobody does."""
    below = [(0.0, True), (rate * (1 - 1e-9), True)]
    return below if rate >= 1 else [*below, (rate * (1 + 1e-9), False)]


def _secret_draws(scene: Scene) -> Iterator[str]:
    """Two sites of equal study, name and round sample and hide differently."""
    one, other = (scene.participant("seed").learner.real_draws() for _ in range(2))
    if np.array_equal(one.uniform(64), other.uniform(64)):
        yield "the sampling follows from the study's seed"
    if np.array_equal(one.normal(64), other.normal(64)):
        yield "the noise follows from the study's seed"
