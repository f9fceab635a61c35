"""Part (a) of an audit: adding a patient, however strange, changes a release by at most the clipping bound.

First one step, whose only seam is `Silent`, which adds no noise; then a whole round of two sites that differ by one
patient, on normal numbers that are all zero: so nothing around the step may look at who is there either.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gapweave.client.audit_site import Finding, Scene, Scripted, finding, joined, nobody, scaled
from gapweave.client.gradients import Gradient
from gapweave.client.state import RoundState, to_arrays
from gapweave.client.training import Step, build_engine
from gapweave.shared.model import MultimodalModel
from gapweave.shared.schema import Batch

SLACK = 1e-3
"""Share by which a measured sensitivity may exceed the declared bound: rounding, part of what engines declare."""
STRONG = 1e4
"""Scale of inputs at which every patient's gradient is far above the clipping bound."""
HUGE = 2.0**23
"""Scale at which float32 products lose more than the clipping bound."""
ORDINARY = 0.3
"""Scale of random weights."""
FAINT = 0.1 / STRONG
"""Scale of encoder weights at which such inputs saturate nothing."""


FEW = 3
CROWDS = (65, 64, 49, 48, 33, 31, 17, 16, 7, 5, 3)
"""Patients of mini-batches, on both sides of blocks that products work on; the losses of the first few must agree."""
GONE = (0, 1, 2, 3, 5, 8)
"""Patients who leave before all others, which then stand so many rows before; the others' losses must agree."""


class Silent(Step):
    """The site's step without its noise: a seam of the audit only, no configuration reaches it."""

    def _noised(self, total: dict[str, Tensor]) -> dict[str, Tensor]:
        return total


def flat(gradient: Gradient) -> NDArray[np.float64]:
    """All tensors of a release in one vector."""
    return np.concatenate([part.detach().cpu().double().numpy().ravel() for part in gradient.values()])


def scaled_model(scene: Scene, encoders: float) -> MultimodalModel:
    """A model of the site away from its initial values: every parameter random; encoders of the given size."""
    model = MultimodalModel(scene.study, scene.held).to(scene.patients.present.device)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = encoders if name.startswith("encoders.") else ORDINARY
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def silent_step(scene: Scene, model: MultimodalModel) -> Silent:
    """A step on a model, without noise and with everyone sampled."""
    return Silent(study=scene.study, plan=scene.plan, engine=build_engine(model, scene.study), draws=Scripted())


def sensitivity(scene: Scene) -> Finding:
    """Adding any patient changes what is released by at most the clipping bound of the event."""
    bound, worst, faults = scene.plan.max_grad_norm, 0.0, []
    for name, change, slack in itertools.chain(_steps(scene), _rounds(scene)):
        worst = max(worst, change) if math.isfinite(change) else math.inf
        if not change <= bound * (1 + SLACK) + slack:
            faults.append(f"{name}: one patient changes a release by {change / bound:.3g} times the bound")
    faults += _memory(scene)
    faults += _rounding(scene)
    return finding("sensitivity", faults, {"worst": worst, "bound": bound})


def _steps(scene: Scene) -> Iterator[tuple[str, float, float]]:
    """(name, change of one step by one patient, 0), in units of the clipped sum."""
    size = scene.plan.sample_rate * scene.plan.n_hat
    for scale in (ORDINARY, FAINT, 0.0):
        step = silent_step(scene, scaled_model(scene, scale))
        before, release = None, np.zeros(0)
        for name, without, added in neighbours(scene):
            if without is not before:
                before, release = without, flat(step.gradient(without))
            yield name, float(np.linalg.norm(flat(step.gradient(joined(without, added))) - release)) * size, 0.0


def _rounds(scene: Scene) -> Iterator[tuple[str, float, float]]:
    """(name, change of a site's round of one step by one patient, what rounding may add to it)."""
    plain = scene.study.training.model_copy(update={"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "ridge": 0.0})
    scene = replace(scene, study=scene.study.model_copy(update={"training": plain}), plan=replace(scene.plan, steps=1))
    size = scene.plan.sample_rate * scene.plan.n_hat
    before, scale = _after_round(scene, scene.patients)
    cell = 2.0**-12 * scene.plan.noise_multiplier * scene.plan.max_grad_norm
    rounding = math.sqrt(len(before)) * cell + 4 * float(np.finfo(np.float32).eps) * scale * size
    for name, added in strange_patients(scene):
        after, _ = _after_round(scene, joined(scene.patients, added))
        yield f"a round with {name}", float(np.linalg.norm(after - before)) * size, rounding


def _after_round(scene: Scene, batch: Batch) -> tuple[NDArray[np.float64], float]:
    """All that a round without noise changed at a site with these patients; the length of what it began with."""
    site = scene.participant("neighbours", batch, draws=Scripted())
    start = to_arrays(site.initial)
    state = site.learner.round(scene.plan, 1, "a round", RoundState(), {group: start[group] for group in site.shared})
    moved = [
        state.reply[group][name] if group in state.reply else state.private[group][name] - value
        for group, part in start.items()
        for name, value in part.items()
    ]
    before = [value.ravel() for part in start.values() for value in part.values()]
    return np.concatenate([part.ravel() for part in moved]).astype(np.float64), float(
        np.linalg.norm(np.concatenate(before))
    )


def _memory(scene: Scene) -> Iterator[str]:
    """An engine's sum follows from its batch and the model: nothing of earlier patients is kept."""
    size = scene.plan.sample_rate * scene.plan.n_hat
    used = silent_step(scene, scaled_model(scene, ORDINARY))
    for seed in (31, 32, 33):
        batch = scene.canaries((1, 2, 1, 3), seed=seed)
        fresh = silent_step(scene, scaled_model(scene, ORDINARY))
        away = float(np.linalg.norm(flat(used.gradient(batch)) - flat(fresh.gradient(batch)))) * size
        if not away <= SLACK * scene.plan.max_grad_norm:
            yield "a sum depends on the batches before it"
            return


def _rounding(scene: Scene) -> Iterator[str]:
    """How many patients are there, and who came before, decides no bit of another's loss.

    A hostile server's parameters can make one bit decide a whole gradient.
    """
    step = silent_step(scene, scaled_model(scene, ORDINARY))
    last = torch.empty(0)

    def objective(model: MultimodalModel, batch: Batch, used: Tensor) -> Tensor:
        nonlocal last
        losses = step.objective(model, batch, used)
        last = losses.detach()[batch.weight > 0]
        return losses

    crowd = max(CROWDS)
    batch, places = scene.canaries((1,) * crowd, seed=17), torch.arange(crowd)

    def rounded(patients: Tensor, those: slice) -> bytes:
        some = batch.of_patients(patients.to(batch.patient.device))
        step.engine.sum(some, some.present, objective)
        return last[those].cpu().numpy().tobytes()

    if len({rounded(places[:count], slice(FEW)) for count in CROWDS}) > 1:
        yield "how many patients there are decides how another's loss is rounded"
    if len({rounded(places[gone:], slice(max(GONE) - crowd, None)) for gone in GONE}) > 1:
        yield "who came before decides how another's loss is rounded"


def neighbours(scene: Scene) -> Iterator[tuple[str, Batch, Batch]]:
    """(name, patients of one data set, the patient that the other has more)."""
    base = scene.canaries((1, 2, 1, 3), seed=11)
    for context, without in (("nobody else", nobody(base)), ("others", base), ("strong others", scaled(base, STRONG))):
        for name, added in strange_patients(scene):
            yield f"{name} with {context}", without, added
    one = scaled(base.of_patients(torch.tensor([0])), 30.0)
    yield "opposite", one, replace(scaled(one, 30.0), target=1 - one.target)
    for at, name in enumerate(scene.study.order):
        if name in scene.held:
            column = torch.zeros(len(scene.study.order), dtype=torch.bool, device=base.present.device)
            column[at] = True
            rare = replace(base, present=base.present & ~column)
            only = base.of_patients(torch.tensor([3]))
            yield f"only holder of {name}", rare, replace(only, present=column.expand(len(only), -1))


def strange_patients(scene: Scene) -> Iterator[tuple[str, Batch]]:
    """Patients who try what a clip may not withstand."""
    one = scene.canaries((1,), seed=12)
    many = scene.canaries((40,), seed=13)
    yield "ordinary", one
    for factor in (STRONG, 1e8, 1e30):
        yield f"inputs x {factor:g}", scaled(one, factor)
    for value in (math.nan, math.inf):
        yield f"inputs of {value}", replace(one, inputs={name: rows * 0 + value for name, rows in one.inputs.items()})
    yield "target of nan", replace(one, target=one.target * math.nan)
    yield "no modality", replace(one, present=one.present & False)
    yield "no label", replace(one, label_mask=one.label_mask & False)
    yield "many records", many
    yield "many records of full weight", replace(scaled(many, STRONG), weight=torch.ones_like(many.weight))
    for name in scene.held:
        for records in (3, 40):
            yield f"{records} cancelling records of {name}", cancelling(scene, records, name)


def cancelling(scene: Scene, records: int, name: str) -> Batch:
    """Records of one patient whose gradients add up to almost nothing, when encoders are at zero.

    Their inputs in one modality are huge whole numbers that add up to zero, and nothing else tells the records
    apart. The exact norm of such a sum can be far below what float32 arithmetic makes of the sum itself.
    """
    batch = scene.canaries((records,), seed=16)
    rows = (batch.inputs[name] * 16).round() * HUGE
    inputs = {**batch.inputs, name: torch.cat([rows[:-1], -rows[:-1].sum(0, keepdim=True)])}
    present = batch.present & False
    present[:, scene.study.order.index(name)] = True
    target, weight = batch.target[:1].expand_as(batch.target), torch.ones_like(batch.weight)
    return replace(batch, inputs=inputs, target=target, present=present, weight=weight)
