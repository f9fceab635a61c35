"""Parts (d) and (e) of an audit: a rehearsed round, recomputed from what was charged, drawn and summed.

The real participant prepares and trains one round on synthetic patients; its engine and draws are heard. From
the ledger's event alone the round is then computed a second time: what the site keeps and sends must be that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special, stats
from torch import Tensor

from gapweave.client.audit_noise import ALPHA
from gapweave.client.audit_sensitivity import SLACK
from gapweave.client.audit_site import (
    RUN,
    CanarySite,
    Finding,
    Heard,
    Scene,
    Scripted,
    Watched,
    finding,
    joined,
)
from gapweave.client.state import Groups, RoundState, to_arrays, to_tensors
from gapweave.client.training import Sgd, train
from gapweave.shared.model import MultimodalModel, groups
from gapweave.shared.privacy.draws import SeededDraws
from gapweave.shared.privacy.events import PrivacyEvent
from gapweave.shared.privacy.ledger import read_ledger
from gapweave.shared.schema import Batch

SAMPLES = 1500
"""Steps over which inclusion is counted."""
REPLAY = 0.01
"""Share of one step's noise by which a recomputed parameter may differ: rounding is a 4000th, no noise is 1."""


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """One round of the real participant on synthetic patients.

    Attributes:
        site: the participant.
        state: after the round.
        event: what its ledger holds for the round; None when nothing was charged.
        charged_before: for each step, whether the event was in the ledger when the engine began.
    """

    site: CanarySite
    state: RoundState
    event: PrivacyEvent | None
    charged_before: list[bool]


def rehearse(scene: Scene) -> Rehearsal:
    """Prepare and train one round."""
    charged: list[bool] = []
    site: CanarySite = scene.participant("rehearsal", at_work=lambda: charged.append(_event(site) is not None))
    site.prepare(RUN)
    start = to_arrays({group: site.initial[group] for group in site.shared})
    state = site.train(RUN, 1, "rehearsed request", start)
    return Rehearsal(site=site, state=state, event=_event(site), charged_before=charged)


def _event(site: CanarySite) -> PrivacyEvent | None:
    """The last charged training event of the run."""
    events = [event for event in read_ledger(site.state).events(RUN) if event.kind == "dp_sgd"]
    return events[-1] if events else None


# (d) Provenance.


def provenance(scene: Scene, rehearsal: Rehearsal) -> Finding:
    """Every tensor of the model is initial, or recomputed from initial values and noised sums."""
    del scene
    site, event = rehearsal.site, rehearsal.event
    faults = list(_hidden_tensors(site))
    if event is None or event.n_hat is None:
        return finding("provenance", [*faults, "no event was charged for the round"], {})
    trained = {name for one in site.watched.sums[:1] for name in one}
    parameters = dict(site.model.named_parameters()).keys()
    faults += [f"{name} is not in the noised gradient" for name in sorted(parameters - trained)]
    if not faults:
        faults += _differences(rehearsal, replayed(site, event, site.heard[-1]), event)
    return finding("provenance", faults, {"tensors": float(len(parameters))})


def _hidden_tensors(site: CanarySite) -> Iterator[str]:
    """Buffers and attributes of the model that training on patients changed."""
    fresh = dict(_constants(MultimodalModel(site.study, site.held)))
    for name, value in _constants(site.model):
        if name not in fresh or not torch.equal(fresh[name], value.cpu()):
            yield f"{name} holds a number from data and has no noise"


def _constants(model: MultimodalModel) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_buffers()
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor):
                yield f"{path}.{key}", value


def replayed(site: CanarySite, event: PrivacyEvent, heard: Heard) -> Groups:
    """The round again, from the event, the sums, and the normal numbers that were drawn.

    Raises:
        ValueError: when fewer noise vectors were drawn than the event has steps.
    """
    model = MultimodalModel(site.study, site.held)
    optimizer = Sgd(site.study, {})
    for total, normals in zip(site.watched.sums[-event.steps :], heard.normals[-event.steps :], strict=True):
        vector = torch.from_numpy(normals * event.noise_multiplier * event.max_grad_norm)
        noise = iter(torch.split(vector, _sizes(total)))
        size = event.sample_rate * (event.n_hat or 0)
        gradient = {
            name: ((value.cpu().double() + next(noise).view(value.shape)) / size).float()
            for name, value in total.items()
        }
        optimizer.step(model, gradient)
    return groups(model)


def _sizes(total: dict[str, Tensor]) -> list[int]:
    return [value.numel() for value in total.values()]


def _differences(rehearsal: Rehearsal, expected: Groups, event: PrivacyEvent) -> Iterator[str]:
    """Tensors that are kept or sent and are not the recomputed ones."""
    study, initial = rehearsal.site.study, rehearsal.site.initial
    sent, kept = to_tensors(rehearsal.state.reply), to_tensors(rehearsal.state.private)
    noise = event.noise_multiplier * event.max_grad_norm / (event.sample_rate * (event.n_hat or 1))
    allowed = study.training.lr * event.steps * noise * REPLAY / (1 - study.training.momentum)
    for group, part in expected.items():
        for name, value in part.items():
            if group in sent:
                found = initial[group][name].cpu() + sent[group][name]
            else:
                found = kept.get(group, {}).get(name, torch.full_like(value, torch.nan))
            away = float((found - value).abs().max())
            if not away <= allowed + 1e-5 * float(value.abs().max()):
                yield f"{group} {name} is not what the charged event gives"
    for group in [*sent, *kept]:
        if group not in expected:
            yield f"{group} is no group of the model"


# (e) Record.


def record(scene: Scene, rehearsal: Rehearsal) -> Finding:
    """Who is sampled, by which numbers, under which draws, and when it was charged."""
    faults = [
        *_charge(scene, rehearsal),
        *_inclusion(scene),
        *_public_numbers(scene),
        *_secret_draws(scene),
    ]
    return finding("record", faults, {"samples": float(SAMPLES), "sample_rate": scene.plan.sample_rate})


def _charge(scene: Scene, rehearsal: Rehearsal) -> Iterator[str]:
    event, plan = rehearsal.event, scene.plan
    if event is None:
        yield "no event was charged for the round"
        return
    if not all(rehearsal.charged_before):
        yield "the engine worked on data before the event was in the ledger"
    if len(rehearsal.charged_before) != event.steps:
        yield f"{len(rehearsal.charged_before)} steps were taken, {event.steps} charged"
    if not rehearsal.site.watched.sensitivity <= event.max_grad_norm * (1 + SLACK):
        yield "the engine declares a larger sensitivity than the event"
    declared = (plan.noise_multiplier, plan.sample_rate, plan.max_grad_norm, plan.n_hat)
    if (event.noise_multiplier, event.sample_rate, event.max_grad_norm, event.n_hat) != declared:
        yield "the charged event is not the plan's"


class _NoOptimizer(Sgd):
    """Leaves the model as it is."""

    def step(self, model: MultimodalModel, gradient: object) -> None:
        """Nothing."""


def _inclusion(scene: Scene) -> Iterator[str]:
    """Patients enter independently, with probability q, with all of their records."""
    data, watched = _named(scene.patients), Watched(None)
    site = scene.participant("inclusion")
    train(site.model, data, scene.step(watched, site.real_draws()), _NoOptimizer(scene.study, {}), SAMPLES)
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
    one, other = (scene.participant("seed").real_draws() for _ in range(2))
    if np.array_equal(one.uniform(64), other.uniform(64)):
        yield "the sampling follows from the study's seed"
    if np.array_equal(one.normal(64), other.normal(64)):
        yield "the noise follows from the study's seed"
