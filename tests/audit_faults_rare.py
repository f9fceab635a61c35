"""Further faults that somebody might plant or make: the audit was not written for any of them in particular."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gapweave.client import learner, training
from gapweave.client.gradients import fast
from gapweave.client.learner import Learner
from gapweave.client.ledger import Ledger
from gapweave.client.participant import Participant
from gapweave.client.training import Sgd, Step
from gapweave.shared.encoders.widedeep import WideDeep
from gapweave.shared.privacy import draws, noise
from gapweave.shared.privacy.draws import SeededDraws
from gapweave.shared.privacy.plan import Plan
from gapweave.shared.schema import Batch

Patch = pytest.MonkeyPatch
Total = dict[str, torch.Tensor]
real_sum, real_noised, real_gradient = fast.FastEngine.sum, Step._noised, Step.gradient

# Faults of noise.


def noised_by(change: Callable[[Step, Total, Total], Total]) -> Callable[[Patch], None]:
    """A fault that makes something else of a sum and its noised value."""

    def plant(patch: Patch) -> None:
        patch.setattr(Step, "_noised", lambda self, total: change(self, total, real_noised(self, total)))

    return plant


def heads_only(step: Step, total: Total, noised: Total) -> Total:
    """Encoders and imputers stay at home, so they seem to need none."""
    return {name: value if name.startswith(("heads.", "fusion.")) else total[name] for name, value in noised.items()}


def clipped_after(step: Step, total: Total, noised: Total) -> Total:
    """Noise first, then the clip, as when both sit in one helper in the wrong order."""
    norm = float(torch.cat([value.flatten() for value in noised.values()]).norm())
    return {name: value * min(1.0, step.engine.sensitivity / max(norm, 1e-12)) for name, value in noised.items()}


def not_on_small_tensors(step: Step, total: Total, noised: Total) -> Total:
    return {name: total[name] if total[name].ndim < 2 else value for name, value in noised.items()}


def some_numbers_without(step: Step, total: Total, noised: Total) -> Total:
    """One number in two hundred has no noise, another each time."""
    return {
        name: torch.where(torch.rand(value.shape) < 0.005, total[name].double(), value)
        for name, value in noised.items()
    }


def not_for_nobody(step: Step, total: Total, noised: Total) -> Total:
    """Empty batches are skipped."""
    return noised if any(value.any() for value in total.values()) else total


def off_the_grid(step: Step, total: Total, noised: Total) -> Total:
    """Noise is not rounded: its last digits tell of the sum (Mironov 2012)."""
    sd = step.plan.noise_multiplier * step.engine.sensitivity
    return {
        name: value.double() + sd * torch.from_numpy(step.draws.normal(value.numel())).view(value.shape)
        for name, value in total.items()
    }


def sometimes_none(patch: Patch) -> None:
    """One step in a hundred goes without."""
    calls = iter(range(10**9))

    def noised(self: Step, total: Total) -> Total:
        return total if next(calls) % 100 == 99 else real_noised(self, total)

    patch.setattr(Step, "_noised", noised)


def root_of_batch(patch: Patch) -> None:
    """Noise is divided by the root of the batch."""

    def gradient(self: Step, data: Batch) -> Total:
        size = max(1.0, data.patients * self.plan.sample_rate)
        plan = replace(self.plan, noise_multiplier=self.plan.noise_multiplier / size**0.5)
        return real_gradient(replace(self, plan=plan), data)

    patch.setattr(Step, "gradient", gradient)


def once_a_round(patch: Patch) -> None:
    """All steps of a round get the noise of the first."""
    kept: dict[int, np.ndarray[Any, Any]] = {}

    def noised(self: Step, total: Total) -> Total:
        real = self.draws

        class Once:
            uniform = real.uniform

            def normal(self, size: int) -> Any:
                return kept.setdefault(id(real), real.normal(size))[:size]

        return real_noised(replace(self, draws=Once()), total)

    patch.setattr(Step, "_noised", noised)


def normals_by(change: Callable[[int], Any]) -> Callable[[Patch], None]:
    """A fault of the normal numbers themselves."""

    def plant(patch: Patch) -> None:
        patch.setattr(draws.SecretDraws, "normal", lambda self, size: change(size))

    return plant


def halves(size: int) -> Any:
    """The second half repeats the first."""
    return np.resize(noise.secret_normals(size // 2 + 1), size)


def mirrored(size: int) -> Any:
    """Antithetic: the second half is the first in reverse order, with the other sign."""
    half = noise.secret_normals((size + 1) // 2)
    return np.concatenate([half, -half[::-1]])[:size]


def signs_only(size: int) -> Any:
    """The second half has the magnitudes of the first, with signs of its own."""
    half = np.abs(noise.secret_normals((size + 1) // 2))
    return np.concatenate([half, half])[:size] * np.where(noise.secret_normals(size) > 0, 1, -1)


def few_dimensions(size: int) -> Any:
    """Fewer independent numbers than coordinates, spread over all of them."""
    few = max(1, size // 3)
    mix = np.random.default_rng(0).integers(0, few, (3, size))
    return noise.secret_normals(few)[mix].sum(0) / 3**0.5


def laplace(size: int) -> Any:
    """The right deviation, another law."""
    return np.sign(noise.secret_normals(size)) * -np.log(1 - draws.SecretDraws().uniform(size)) / 2**0.5


def cut_tail(size: int) -> Any:
    """Numbers are cut at three deviations: whoever is beyond is seen for sure."""
    return np.clip(noise.secret_normals(size), -3, 3)


def random_scale(size: int) -> Any:
    """A common factor of its own for each release."""
    return noise.secret_normals(size) * (1 + 0.3 * noise.secret_normals(2)[0]) / 1.09**0.5


def from_the_round(patch: Patch) -> None:
    """A recomputed round repeats its noise: draws follow from a key that the site keeps."""

    def kept(self: Learner, number: int | str) -> Any:
        key = hashlib.sha256(f"{self._site}/{number}".encode()).hexdigest()
        return SeededDraws(key)

    patch.setattr(Learner, "draws", kept)


# Faults of clipping.


def sums_by(change: Callable[[Any, Batch, Any, Any], Total]) -> Callable[[Patch], None]:
    def plant(patch: Patch) -> None:
        patch.setattr(fast.FastEngine, "sum", change)

    return plant


def with_bound(engine: Any, bound: float, batch: Batch, used: Any, objective: Any) -> Total:
    before, engine.bound = engine.bound, bound
    try:
        return real_sum(engine, batch, used, objective)
    finally:
        engine.bound = before


def twice_the_bound(engine: Any, batch: Batch, used: Any, objective: Any) -> Total:
    return with_bound(engine, 2 * engine.bound, batch, used, objective)


def one_encoder_free(engine: Any, batch: Batch, used: Any, objective: Any) -> Total:
    free = with_bound(engine, 1e9, batch, used, objective)
    clipped = real_sum(engine, batch, used, objective)
    return {name: free[name] if name.startswith("encoders.note") else value for name, value in clipped.items()}


def group_by_group(engine: Any, batch: Batch, used: Any, objective: Any) -> Total:
    """Each tensor is clipped to C on its own: together they are longer."""
    ones = [batch.of_patients(torch.tensor([at])) for at in range(batch.patients)]
    total = {name: torch.zeros_like(value) for name, value in real_sum(engine, batch, used, objective).items()}
    starts = np.cumsum([0, *(len(one) for one in ones)])
    for at, one in enumerate(ones):
        part = with_bound(engine, 1e9, one, used[starts[at] : starts[at + 1]], objective)
        for name, value in part.items():
            total[name] += value * float(min(1.0, engine.bound / max(float(value.norm()), 1e-12)))
    return total


def record_by_record(engine: Any, batch: Batch, used: Any, objective: Any) -> Total:
    """Records are clipped, not patients."""
    alone = replace(batch, patient=torch.arange(len(batch)), patients=len(batch), weight=torch.ones_like(batch.weight))
    return real_sum(engine, alone, used, objective)


def nan_by_multiplying(engine: Any, batch: Batch, used: Any, objective: Any) -> Total:
    """A patient with a non-finite value is taken out by a factor of zero."""
    nothing = 0.0 * sum(float(rows.sum()) for rows in batch.inputs.values()) if len(batch) else 0.0
    return {name: value + nothing for name, value in real_sum(engine, batch, used, objective).items()}


def cached(patch: Patch) -> None:
    """Sums are kept by the number of records."""
    kept: dict[int, Total] = {}

    def summed(engine: Any, batch: Batch, used: Any, objective: Any) -> Total:
        if len(batch) not in kept:
            kept[len(batch)] = real_sum(engine, batch, used, objective)
        return kept[len(batch)]

    patch.setattr(fast.FastEngine, "sum", summed)


def batch_norm(patch: Patch) -> None:
    """A layer that every engine must refuse."""
    real = WideDeep.__init__

    def built(self: WideDeep, *arguments: Any, **keywords: Any) -> None:
        real(self, *arguments, **keywords)
        self.norm = nn.BatchNorm1d(1)

    patch.setattr(WideDeep, "__init__", built)


def batch_norm_unseen(patch: Patch) -> None:
    """The same as a function of torch, with the engine's own test switched off."""
    patch.setattr(fast, "probe_independence", lambda *_: None)
    real = WideDeep.forward

    def forward(self: WideDeep, rows: torch.Tensor) -> torch.Tensor:
        return real(self, nn.functional.batch_norm(rows, None, None, training=True) if len(rows) > 1 else rows)

    patch.setattr(WideDeep, "forward", forward)


def standardised_at_home(patch: Patch) -> None:
    """The site's own mean is taken off its inputs before the step sees them."""

    def centred(self: Participant) -> Batch:
        data = self.cohort.training().to(self.device)
        return replace(data, inputs={name: rows - rows.nanmean(0) for name, rows in data.inputs.items()})

    patch.setattr(Participant, "training", cached_property(centred))
    Participant.training.__set_name__(Participant, "training")


def class_weights(patch: Patch) -> None:
    """Records weigh by how rare their class is at the site."""

    def weighted(self: Participant) -> Batch:
        data = self.cohort.training().to(self.device)
        rare = data.target[:, 0].nan_to_num().mean().clamp(0.05, 0.95)
        return replace(data, weight=data.weight * torch.where(data.target[:, 0] > 0.5, 1 / rare, 1 / (1 - rare)))

    patch.setattr(Participant, "training", cached_property(weighted))
    Participant.training.__set_name__(Participant, "training")


# Faults of sampling.


def chosen_by(choose: Callable[[Step, Batch], Any]) -> Callable[[Patch], None]:
    def plant(patch: Patch) -> None:
        def gradient(self: Step, data: Batch) -> Total:
            batch = data.of_patients(torch.as_tensor(np.asarray(choose(self, data), dtype=np.int64)))
            total = self._noised(self.engine.sum(batch, self.used(batch), self.objective))
            size = self.plan.sample_rate * self.plan.n_hat
            return {name: (value / size).float() for name, value in total.items()}

        patch.setattr(Step, "gradient", gradient)

    return plant


def with_replacement(step: Step, data: Batch) -> Any:
    count = int((step.draws.uniform(data.patients) < step.plan.sample_rate).sum())
    return np.sort((step.draws.uniform(count) * data.patients).astype(int))


def twice_in_a_batch(step: Step, data: Batch) -> Any:
    two = step.draws.uniform(data.patients) < step.plan.sample_rate / 2
    return np.sort(np.concatenate([two.nonzero()[0], two.nonzero()[0]]))


def sick_more_often(step: Step, data: Batch) -> Any:
    """Patients of the rarer class enter at a higher rate than was charged."""
    sick = np.zeros(data.patients)
    sick[data.patient.numpy()] = data.target[:, 0].numpy() > 0
    return (step.draws.uniform(data.patients) < step.plan.sample_rate * (1 + sick)).nonzero()[0]


def never_nobody(step: Step, data: Batch) -> Any:
    """Drawn again until somebody is in."""
    for _ in range(50):
        chosen = (step.draws.uniform(data.patients) < step.plan.sample_rate).nonzero()[0]
        if len(chosen):
            break
    return chosen


# Faults of the round.


def momentum_without(patch: Patch) -> None:
    """Momentum collects the sums before the noise."""
    clean: list[Total] = []

    def noised(self: Step, total: Total) -> Total:
        clean.append({name: value / self.plan.sample_rate / self.plan.n_hat for name, value in total.items()})
        return real_noised(self, total)

    def step(self: Sgd, model: nn.Module, gradient: Any) -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                velocity = self.buffers.get(name, torch.zeros_like(parameter)) * self._training.momentum
                parameter.sub_(self._training.lr * (gradient[name] + velocity))
                self.buffers[name] = velocity + clean[-1][name].float()

    patch.setattr(Step, "_noised", noised)
    patch.setattr(Sgd, "step", step)


def fewer_steps_charged(patch: Patch) -> None:
    real = Plan.event
    patch.setattr(Plan, "event", lambda self, released, steps=None: real(self, released, 1))


def larger_noise_charged(patch: Patch) -> None:
    real = Plan.event
    patch.setattr(
        Plan,
        "event",
        lambda self, *rest: replace(real(self, *rest), noise_multiplier=1.5 * self.noise_multiplier),
    )


def smaller_rate_charged(patch: Patch) -> None:
    real = Plan.event
    patch.setattr(Plan, "event", lambda self, *rest: replace(real(self, *rest), sample_rate=0.5 * self.sample_rate))


def later_rounds_free(patch: Patch) -> None:
    """Only the first round is charged."""
    real = Ledger.charge

    def charge(self: Ledger, run: str, study: str, request: str, event: Any, *rest: Any, **keys: Any) -> Any:
        if event.released == "update of round 1":
            return real(self, run, study, request, event, *rest, **keys)
        return None

    patch.setattr(Ledger, "charge", charge)


def drawn_in_vain(step: Step, total: Total) -> Total:
    """Noise is drawn and not added."""
    step.draws.normal(sum(value.numel() for value in total.values()))
    return total


def later_rounds_bare(patch: Patch) -> None:
    """Noise in the first round only."""
    real = Learner.round

    def trained(self: Learner, plan: Plan, number: int, *rest: Any) -> Any:
        if number > 1:
            with pytest.MonkeyPatch.context() as inner:
                inner.setattr(Step, "_noised", drawn_in_vain)
                return real(self, plan, number, *rest)
        return real(self, plan, number, *rest)

    patch.setattr(Learner, "round", trained)


def loss_in_the_reply(patch: Patch) -> None:
    """The reply tells how the round went."""
    real = Learner.round

    def trained(self: Learner, *arguments: Any) -> Any:
        state = real(self, *arguments)
        return replace(state, event={**state.event, "loss": float(self._training().target.mean())})

    patch.setattr(Learner, "round", trained)


def statistics_in_the_reply(patch: Patch) -> None:
    real = Learner.round

    def trained(self: Learner, *arguments: Any) -> Any:
        state = real(self, *arguments)
        mean = self._training().target.mean(0).numpy()
        return replace(state, reply={**state.reply, "statistics": {"mean": mean}})

    patch.setattr(Learner, "round", trained)


def first_layers_of_data(patch: Patch) -> None:
    """Biases start at the site's own log-odds."""
    real = Learner.round

    def trained(self: Learner, *arguments: Any) -> Any:
        rate = float(self._training().target.mean())
        for part in self.initial.values():
            for name, value in part.items():
                if name.endswith("bias"):
                    value.fill_(rate)
        return real(self, *arguments)

    patch.setattr(Learner, "round", trained)


def one_step_unnoised(patch: Patch) -> None:
    """A warm-up step before the noised ones, with the engine's sum as it is."""
    real = training.train

    def train(model: nn.Module, data: Batch, step: Step, sgd: Sgd, steps: int) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(Step, "_noised", lambda self, total: total)
            real(model, data, step, sgd, 1)
        real(model, data, step, sgd, steps - 1)

    patch.setattr(learner, "train", train)


RARE_FAULTS: dict[str, tuple[Callable[[Patch], None], set[str]]] = {
    "noise on what leaves only": (noised_by(heads_only), {"noise law", "provenance"}),
    "clip after the noise": (noised_by(clipped_after), {"noise law"}),
    "no noise on biases": (noised_by(not_on_small_tensors), {"noise law", "provenance"}),
    "some numbers without noise": (noised_by(some_numbers_without), {"noise law"}),
    "no noise for nobody": (noised_by(not_for_nobody), {"noise law"}),
    "noise off the grid": (noised_by(off_the_grid), {"noise law"}),
    "one step in a hundred without noise": (sometimes_none, {"noise law"}),
    "noise over the root of B": (root_of_batch, {"noise law"}),
    "noise once a round": (once_a_round, {"noise law"}),
    "noise in repeated halves": (normals_by(halves), {"noise law"}),
    "noise mirrored": (normals_by(mirrored), {"noise law"}),
    "noise of repeated magnitudes": (normals_by(signs_only), {"noise law"}),
    "noise of few dimensions": (normals_by(few_dimensions), {"noise law"}),
    "Laplace noise": (normals_by(laplace), {"noise law"}),
    "noise with a cut tail": (normals_by(cut_tail), {"noise law"}),
    "noise of random scale": (normals_by(random_scale), {"noise law"}),
    "noise from the round": (from_the_round, {"noise law", "record"}),
    "clip at 2 C": (sums_by(twice_the_bound), {"sensitivity"}),
    "one encoder not clipped": (sums_by(one_encoder_free), {"sensitivity"}),
    "clip tensor by tensor": (sums_by(group_by_group), {"sensitivity"}),
    "clip record by record": (sums_by(record_by_record), {"sensitivity"}),
    "NaN by multiplying": (sums_by(nan_by_multiplying), {"sensitivity"}),
    "cached sums": (cached, {"sensitivity"}),
    "BatchNorm": (batch_norm, {"sensitivity"}),
    "BatchNorm, engine blind": (batch_norm_unseen, {"sensitivity"}),
    "inputs centred at home": (standardised_at_home, {"sensitivity"}),
    "class weights of the site": (class_weights, {"sensitivity"}),
    "sampling with replacement": (chosen_by(with_replacement), {"record"}),
    "patients twice in a batch": (chosen_by(twice_in_a_batch), {"record"}),
    "the sick sampled more often": (chosen_by(sick_more_often), {"record"}),
    "no empty batches": (chosen_by(never_nobody), {"record"}),
    "momentum before the noise": (momentum_without, {"provenance"}),
    "fewer steps charged": (fewer_steps_charged, {"record"}),
    "larger noise charged": (larger_noise_charged, {"record", "provenance"}),
    "smaller rate charged": (smaller_rate_charged, {"record"}),
    "later rounds not charged": (later_rounds_free, {"record"}),
    "later rounds without noise": (later_rounds_bare, {"provenance"}),
    "a loss in the reply": (loss_in_the_reply, {"record"}),
    "statistics in the reply": (statistics_in_the_reply, {"provenance"}),
    "initial values from data": (first_layers_of_data, {"provenance"}),
    "a step without noise first": (one_step_unnoised, {"provenance"}),
}
