"""Faults to plant in a private step, each with the parts of an audit that must find it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor, nn

from gapweave.client import learner, participant, training
from gapweave.client.gradients import fast, padding
from gapweave.client.ledger import Ledger
from gapweave.client.training import Step
from gapweave.shared.encoders.widedeep import WideDeep
from gapweave.shared.privacy import draws, noise
from gapweave.shared.privacy.draws import SeededDraws
from gapweave.shared.privacy.plan import make_plan

Patch = pytest.MonkeyPatch

# Faults of noise.


def louder(factor: float) -> Callable[[Patch], None]:
    def plant(patch: Patch) -> None:
        real = Step._noised

        def noised(self: Step, total: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name: total[name] + factor * (value - total[name]) for name, value in real(self, total).items()}

        patch.setattr(Step, "_noised", noised)

    return plant


def noise_over_batch(patch: Patch) -> None:
    """The classic of averaged gradients: noise for the sum is divided by the true size of the batch."""
    real_sum, sizes = fast.FastEngine.sum, [1]

    def counted(self: Any, batch: Any, used: Any, objective: Any) -> Any:
        sizes.append(max(1, batch.patients))
        return real_sum(self, batch, used, objective)

    real = Step._noised

    def noised(self: Step, total: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: total[name] + (value - total[name]) / sizes[-1] for name, value in real(self, total).items()}

    patch.setattr(fast.FastEngine, "sum", counted)
    patch.setattr(Step, "_noised", noised)


def seed_reuse(patch: Patch) -> None:
    """Each round's noise starts from the same key."""
    patch.setattr(noise, "_secret_bytes", lambda size: np.random.default_rng(5).bytes(size))


def forked_key(patch: Patch) -> None:
    """One key a process: different in every release, and copied by a fork."""
    stream = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(os.urandom(16))).encryptor()
    patch.setattr(noise, "_secret_bytes", lambda size: stream.update(bytes(size)))


def unnoised_encoder(patch: Patch) -> None:
    """Only heads leave, so only heads are noised: but they are computed from the encoders."""
    real = Step._noised

    def noised(self: Step, total: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name: total[name] if name.startswith("encoders.labs") else value
            for name, value in real(self, total).items()
        }

    patch.setattr(Step, "_noised", noised)


def one_number_a_tensor(patch: Patch) -> None:
    """A broadcast too many: all entries of a release get the same noise."""
    patch.setattr(draws.SecretDraws, "normal", lambda self, size: np.full(size, noise.secret_normals(2)[0]))


# Faults of clipping.


def no_clipping(patch: Patch) -> None:
    real = fast.FastEngine.__init__

    def unbounded(self: Any, *arguments: Any) -> None:
        real(self, *arguments)
        self.bound = 1e9

    patch.setattr(fast.FastEngine, "__init__", unbounded)


def batch_clipping(patch: Patch) -> None:
    """The gradient of the whole batch is clipped instead of each patient's."""
    no_clipping(patch)
    real = fast.FastEngine.sum

    def clipped(self: Any, batch: Any, used: Any, objective: Any) -> Any:
        total = real(self, batch, used, objective)
        norm = float(torch.cat([value.flatten() for value in total.values()]).norm())
        factor = min(1.0, self.sensitivity / max(norm, 1e-12))
        return {name: value * factor for name, value in total.items()}

    patch.setattr(fast.FastEngine, "sum", clipped)


def float32_norms(patch: Patch) -> None:
    """Norms without their rounding errors: records that cancel keep what float32 lost, unclipped."""
    patch.setattr(fast, "ROUNDING", 0)


def unprobed(patch: Patch) -> None:
    """Without the engine's own test of independence: the audit must see for itself."""
    patch.setattr(fast, "probe_independence", lambda *_: None)


def batch_mean(patch: Patch) -> None:
    """An encoder as a plug-in might write it: it centres its inputs on the batch."""
    real = WideDeep.forward
    patch.setattr(WideDeep, "forward", lambda self, rows: real(self, rows - rows.mean(0)))


def batch_mean_unprobed(patch: Patch) -> None:
    unprobed(patch)
    batch_mean(patch)


def left_over_rows(patch: Patch) -> None:
    """Mini-batches as they are drawn: products round the rows of the last block in another way."""
    patch.setattr(fast, "padded", lambda batch, used: (batch, used))


def rows_anywhere(patch: Patch) -> None:
    """Products that round every third row in another way, as where rows begin in the middle of a line of memory."""

    def product(layer: nn.Linear, inputs: Tensor) -> Tensor:
        place = torch.arange(len(inputs)).view(-1, *[1] * (inputs.ndim - 1))
        return nn.functional.linear(inputs, layer.weight, layer.bias) * torch.where(place % 3 == 0, 1 + 2.0**-22, 1.0)

    patch.setattr(padding, "_forward", product)


def subset(patch: Patch) -> None:
    """Losses are means over those who have the modality, instead of constants."""
    unprobed(patch)
    real = Step.objective

    def losses(self: Step, model: Any, batch: Any, used: Any) -> torch.Tensor:
        return real(self, model, batch, used) / batch.present.sum(0).max().clamp(min=1)

    patch.setattr(Step, "objective", losses)


def statistics_kept(patch: Patch) -> None:
    """An encoder that remembers a mean of its patients, which later batches read."""
    real = WideDeep.forward

    def forward(self: WideDeep, rows: torch.Tensor) -> torch.Tensor:
        if len(rows) > 1:
            self.centre = rows.detach().mean(0)
        return real(self, rows)

    patch.setattr(WideDeep, "forward", forward)


# Faults of sampling and of numbers.


def shuffled(patch: Patch) -> None:
    """Batches of one size from a shuffled list, charged as Poisson samples."""
    order: list[int] = []

    def gradient(self: Step, data: Any) -> dict[str, torch.Tensor]:
        size = max(1, int(self.plan.sample_rate * data.patients))
        if len(order) < size:
            order[:] = np.argsort(self.draws.uniform(data.patients)).tolist()
        chosen = sorted(order.pop() for _ in range(min(size, data.patients)))
        batch = data.of_patients(torch.tensor([one for one in chosen if one < data.patients]))
        total = self._noised(self.engine.sum(batch, self.used(batch), self.objective))
        return {name: (value / self.plan.sample_rate / self.plan.n_hat).float() for name, value in total.items()}

    patch.setattr(Step, "gradient", gradient)


def true_denominator(patch: Patch) -> None:
    def gradient(self: Step, data: Any) -> dict[str, torch.Tensor]:
        chosen = torch.from_numpy(self.draws.uniform(data.patients) < self.plan.sample_rate).nonzero()[:, 0]
        batch = data.of_patients(chosen)
        total = self._noised(self.engine.sum(batch, self.used(batch), self.objective))
        return {name: (value / max(1, batch.patients)).float() for name, value in total.items()}

    patch.setattr(Step, "gradient", gradient)


def true_rate(patch: Patch) -> None:
    """q = B / n with the number of patients who are there."""
    real = Step.gradient

    def gradient(self: Step, data: Any) -> dict[str, torch.Tensor]:
        rate = min(1.0, self.study.training.batch / max(1, data.patients))
        return real(replace(self, plan=replace(self.plan, sample_rate=rate)), data)

    patch.setattr(Step, "gradient", gradient)


def true_n_in_the_plan(patch: Patch) -> None:
    patch.setattr(
        participant.Participant,
        "_plan",
        lambda self, ledger, run: make_plan(self.study, self.training.patients, 1e-5),
    )


def study_seed(patch: Patch) -> None:
    patch.setattr(learner.Learner, "draws", lambda self, number: SeededDraws(self._study.seed, self._site, number))


def sampling_from_the_seed(patch: Patch) -> None:
    """Noise is secret, who is sampled is not."""

    class Half(draws.SecretDraws):
        def __init__(self, *key: object) -> None:
            self.seeded = SeededDraws(*key)

        def uniform(self, *shape: int) -> Any:
            return self.seeded.uniform(*shape)

    patch.setattr(learner.Learner, "draws", lambda self, number: Half(self._study.seed, number))


def per_record(patch: Patch) -> None:
    def gradient(self: Step, data: Any) -> dict[str, torch.Tensor]:
        rows = torch.from_numpy(self.draws.uniform(len(data)) < self.plan.sample_rate).nonzero()[:, 0]
        batch = data.rows(rows)
        total = self._noised(self.engine.sum(batch, self.used(batch), self.objective))
        size = self.plan.sample_rate * self.plan.n_hat
        return {name: (value / size).float() for name, value in total.items()}

    patch.setattr(Step, "gradient", gradient)


def late_charge(patch: Patch) -> None:
    """The event is written after the work: a crash in between leaves a release without a row."""
    owed: list[Callable[[], None]] = []
    real_charge, real_released = Ledger.charge, Ledger.released
    patch.setattr(Ledger, "charge", lambda self, *row, **rest: owed.append(lambda: real_charge(self, *row, **rest)))

    def released(self: Ledger, request: str) -> None:
        while owed:
            owed.pop()()
        real_released(self, request)

    patch.setattr(Ledger, "released", released)


def a_step_more(patch: Patch) -> None:
    real = training.train
    patch.setattr(learner, "train", lambda model, data, step, sgd, steps: real(model, data, step, sgd, steps + 1))


def unnoised_step_at_home(patch: Patch) -> None:
    """Before the noised steps, the groups that stay at home take a plain one."""
    real = training.train

    def train(model: nn.Module, data: Any, step: Step, sgd: Any, steps: int) -> None:
        real(model, data, step, sgd, steps)
        with torch.no_grad():
            for parameter in model.encoders.parameters():
                parameter.add_(0.01 * float(data.target.mean()))

    patch.setattr(learner, "train", train)


FAULTS: dict[str, tuple[Callable[[Patch], None], set[str]]] = {
    "noise x 0.75": (louder(0.75), {"noise law"}),
    "noise x 1.33": (louder(1.33), {"noise law"}),
    "no noise": (louder(0.0), {"noise law", "black box", "one run"}),
    "noise over B": (noise_over_batch, {"noise law"}),
    "seed reuse": (seed_reuse, {"noise law"}),
    "forked key": (forked_key, {"noise law"}),
    "one number a tensor": (one_number_a_tensor, {"noise law"}),
    "un-noised encoder": (unnoised_encoder, {"noise law", "provenance"}),
    "un-noised step at home": (unnoised_step_at_home, {"provenance"}),
    "no clipping": (no_clipping, {"sensitivity"}),
    "batch clipping": (batch_clipping, {"sensitivity"}),
    "float32 cancelling norms": (float32_norms, {"sensitivity"}),
    "rows left over of a block": (left_over_rows, {"sensitivity"}),
    "rows that begin anywhere": (rows_anywhere, {"sensitivity"}),
    "batch mean": (batch_mean, {"sensitivity"}),
    "batch mean, engine blind": (batch_mean_unprobed, {"sensitivity"}),
    "subset instead of mask": (subset, {"sensitivity"}),
    "statistics kept": (statistics_kept, {"provenance"}),
    "shuffled batches": (shuffled, {"record"}),
    "denominator from the true n": (true_denominator, {"record"}),
    "q from the true n": (true_rate, {"record"}),
    "plan from the true n": (true_n_in_the_plan, {"record"}),
    "everything from the study's seed": (study_seed, {"record"}),
    "sampling from the study's seed": (sampling_from_the_seed, {"record"}),
    "sampling of records": (per_record, {"record"}),
    "charge after release": (late_charge, {"record"}),
    "a step more than charged": (a_step_more, {"record"}),
}
