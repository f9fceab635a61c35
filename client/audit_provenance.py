"""Part (d) of an audit: rehearsed rounds, recomputed from what was charged, drawn and summed.

The real participant prepares and trains two rounds on synthetic patients; its engine and draws are heard. From
the ledger's events alone the rounds are then computed a second time: what the site keeps and sends must be that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gapweave.client.audit_site import RUN, CanarySite, Finding, Heard, Scene, finding
from gapweave.client.gradients import Gradient
from gapweave.client.state import Groups, RoundState, to_arrays, to_tensors
from gapweave.shared.config import Study
from gapweave.shared.config.training import Training
from gapweave.shared.messages import as_corrections, split_corrections
from gapweave.shared.model import MultimodalModel, group_of, groups, load_groups
from gapweave.shared.privacy.events import PrivacyEvent
from gapweave.shared.privacy.ledger import read_ledger
from gapweave.shared.tensorfile import Arrays

REPLAY = 0.01
"""Share of one step's noise by which a recomputed parameter may differ: rounding is a 4000th, no noise is 1."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round of the real participant on synthetic patients.

    Attributes:
        received: what the server sent, corrections of steps included.
        state: after the round.
        event: what the ledger holds for the round; None when nothing was charged.
        charged_before: for each step, whether the event was in the ledger when the engine began.
        sums: of the engine.
        heard: draws of the round.
    """

    received: Arrays
    state: RoundState
    event: PrivacyEvent | None
    charged_before: list[bool]
    sums: list[Gradient]
    heard: Heard


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """The first rounds of the real participant: the second begins with what the first kept."""

    site: CanarySite
    rounds: list[Round]


def rehearse(scene: Scene) -> Rehearsal:
    """Prepare, and train two rounds with a server that adds what it got."""
    charged: list[bool] = []
    rounds: list[Round] = []
    site: CanarySite = scene.participant(
        "rehearsal", at_work=lambda: charged.append(_event(site, len(rounds)) is not None)
    )
    site.prepare(RUN)
    received = to_arrays({group: site.initial[group] for group in site.shared})
    corrections = as_corrections(received) if scene.study.training.scaffold else {}
    for number in range(1, min(2, scene.plan.rounds) + 1):
        done, before = len(charged), len(site.learner.engine.sums)
        sent = {**received, **corrections}
        state = site.train(RUN, number, f"rehearsed request {number}", sent)
        rounds.append(
            Round(
                received=sent,
                state=state,
                event=_event(site, number - 1),
                charged_before=charged[done:],
                sums=site.learner.engine.sums[before:],
                heard=site.learner.heard[-1],
            )
        )
        received = {
            group: {name: value + state.reply[group][name] for name, value in part.items()}
            for group, part in received.items()
        }
    return Rehearsal(site=site, rounds=rounds)


def _event(site: CanarySite, at: int) -> PrivacyEvent | None:
    """The training event of the run that was charged at this place."""
    events = [event for event in read_ledger(site.state).events(RUN) if event.kind == "dp_sgd"]
    return events[at] if len(events) > at else None


def provenance(scene: Scene, rehearsal: Rehearsal) -> Finding:
    """Every tensor of the model is initial, or recomputed from initial values and noised sums."""
    del scene
    site = rehearsal.site
    faults = list(_hidden_tensors(site))
    if any(one.event is None or one.event.n_hat is None for one in rehearsal.rounds):
        return finding("provenance", [*faults, "no event was charged for a round"], {})
    trained = {name for one in site.learner.engine.sums[:1] for name in one}
    parameters = dict(site.learner.model.named_parameters()).keys()
    faults += [f"{name} is not in the noised gradient" for name in sorted(parameters - trained)]
    if not faults:
        faults += _differences(rehearsal)
    return finding("provenance", faults, {"tensors": float(len(parameters))})


def _hidden_tensors(site: CanarySite) -> Iterator[str]:
    """Buffers and attributes of the model that training on patients changed."""
    fresh = dict(_constants(MultimodalModel(site.study, site.held)))
    for name, value in _constants(site.learner.model):
        if name not in fresh or not torch.equal(fresh[name], value.cpu()):
            yield f"{name} holds a number from data and has no noise"


def _constants(model: MultimodalModel) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_buffers()
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor):
                yield f"{path}.{key}", value


class Descent:
    """SGD with momentum, written a second time: the site's own may not see more than the noised gradient.

    Args:
        study: gives learning rate, momentum, shrinkage and proximal term.
    """

    def __init__(self, study: Study) -> None:
        self._training, self._shrinkage = study.training, study.shrinkage
        self._velocity: dict[str, Tensor] = {}

    def step(self, model: MultimodalModel, gradient: dict[str, Tensor], received: Groups, corrections: Groups) -> None:
        """Change the model in place.

        Args:
            model: of the site.
            gradient: noised, by parameter.
            received: the shared groups that the round began with.
            corrections: of some of them, as the server sent them.
        """
        training = self._training
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                group, key = group_of(name)
                slope = gradient[name] + self._shrinkage * parameter
                if group in received:
                    slope = slope + training.proximal * (parameter - received[group][key])
                if group in corrections:
                    slope = slope + corrections[group][key]
                velocity = training.momentum * self._velocity.get(name, torch.zeros_like(slope)) + slope
                self._velocity[name] = velocity
                parameter.sub_(training.lr * velocity)


def _replay(model: MultimodalModel, descent: Descent, one: Round, event: PrivacyEvent) -> None:
    """The round again, from the event, the sums, and the normal numbers that were drawn."""
    received, corrections = map(to_tensors, split_corrections(one.received))
    load_groups(model, received)
    size = event.sample_rate * (event.n_hat or 0)
    for total, normals in zip(one.sums, one.heard.normals, strict=True):
        vector = torch.from_numpy(normals * event.noise_multiplier * event.max_grad_norm)
        noise = iter(torch.split(vector, _sizes(total)))
        gradient = {
            name: ((value.cpu().double() + next(noise).view(value.shape)) / size).float()
            for name, value in total.items()
        }
        descent.step(model, gradient, received, corrections)


def _sizes(total: dict[str, Tensor]) -> list[int]:
    return [value.numel() for value in total.values()]


def _differences(rehearsal: Rehearsal) -> Iterator[str]:
    """Tensors that are kept or sent and are not the recomputed ones."""
    site = rehearsal.site
    model, descent = MultimodalModel(site.study, site.held), Descent(site.study)
    allowed = 0.0
    for one in rehearsal.rounds:
        if one.event is None:
            return
        drawn, needed = [len(normals) for normals in one.heard.normals], [sum(_sizes(total)) for total in one.sums]
        if drawn != needed or len(drawn) != one.event.steps:
            yield f"noise was drawn for {len(drawn)} steps or for other tensors; {one.event.steps} steps were charged"
            return
        _replay(model, descent, one, one.event)
        allowed += _allowed(site.study.training, one.event)
        sent, kept = to_tensors(one.state.reply), to_tensors(one.state.private)
        received, expected = to_tensors(one.received), groups(model)
        for group, part in expected.items():
            for name, value in part.items():
                if group in sent:
                    found = received[group][name] + sent[group][name]
                else:
                    found = kept.get(group, {}).get(name, torch.full_like(value, torch.nan))
                if not float((found - value).abs().max()) <= allowed + 1e-5 * float(value.abs().max()):
                    yield f"{group} {name} is not what the charged event gives"
        yield from (f"{group} is no group of the model" for group in [*sent, *kept] if group not in expected)


def _allowed(training: Training, event: PrivacyEvent) -> float:
    """What rounding may do to a parameter in a round."""
    noise = event.noise_multiplier * event.max_grad_norm / (event.sample_rate * (event.n_hat or 1))
    return training.lr * event.steps * noise * REPLAY / (1 - training.momentum)
