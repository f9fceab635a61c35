"""The site's training step: Poisson sampling, clipped sums, noise, and a plain optimiser after the noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from gapweave.client.gradients import GradientEngine
from gapweave.client.gradients.clipping import GROUPINGS
from gapweave.client.gradients.fast import FastEngine
from gapweave.client.gradients.opacus import OpacusEngine
from gapweave.client.gradients.plain import PlainEngine
from gapweave.client.requests import LARGEST
from gapweave.shared.config.study import Study
from gapweave.shared.model import MultimodalModel
from gapweave.shared.privacy.draws import Draws
from gapweave.shared.privacy.noise import on_grid
from gapweave.shared.privacy.plan import Plan
from gapweave.shared.schema import Batch
from gapweave.shared.schemes import WHOLE, Moment, Scheme, build_scheme


def build_engine(model: MultimodalModel, study: Study) -> GradientEngine:
    """The gradient engine that the study's privacy asks for."""
    if not study.privacy.enabled:
        return PlainEngine(model, study.task.kind)
    clipped = OpacusEngine if study.privacy.engine == "opacus" else FastEngine
    return clipped(model, study.task.kind, study.privacy.max_grad_norm, GROUPINGS[study.privacy.clipping])


@dataclass(frozen=True, kw_only=True)
class Step:
    """One training step of a site, as its privacy event describes it.

    Guarantee: each step is a Gaussian mechanism with sensitivity C and noise sigma C on a Poisson sample of
    patients; every trained tensor gets noise, whether or not it leaves.
    """

    study: Study
    plan: Plan
    engine: GradientEngine
    draws: Draws
    at: Moment = WHOLE

    def gradient(self, data: Batch) -> dict[str, Tensor]:
        """The noised mean gradient; denominators use the public n_hat, never the true number."""
        plan = self.plan
        chosen = torch.from_numpy(self.draws.uniform(data.patients) < plan.sample_rate).nonzero()[:, 0]
        batch = data.of_patients(chosen.to(data.patient.device))
        size = plan.sample_rate * plan.n_hat
        if self.engine.sensitivity == math.inf:
            # Nothing is clipped, so a division a record does what one a parameter would.
            shares = replace(batch, weight=batch.weight / size)
            return self.engine.sum(self.shown(shares), self.used(batch), self.objective)
        total = self.engine.sum(self.shown(batch), self.used(batch), self.objective)
        noised = self._noised(total)
        means = torch._foreach_div(list(noised.values()), size)
        return {name: mean.float() for name, mean in zip(noised, means, strict=True)}

    def _noised(self, total: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add noise of sigma times the engine's sensitivity to every tensor, also to those that no patient touched."""
        if self.plan.noise_multiplier == 0:
            return total
        sd = self.plan.noise_multiplier * self.engine.sensitivity
        vector = torch.cat([tensor.flatten() for tensor in total.values()])
        noise = torch.from_numpy(self.draws.normal(len(vector))).to(vector.device)
        parts = torch.split(on_grid(vector, noise, sd), [tensor.numel() for tensor in total.values()])
        return {name: part.view(tensor.shape) for (name, tensor), part in zip(total.items(), parts, strict=True)}

    def used(self, batch: Batch) -> Tensor:
        """[R, M] bool: which modalities inform each record's prediction at this step."""
        uniform = torch.from_numpy(self.draws.uniform(len(batch), batch.present.shape[1] + 1)).float()
        return self.scheme.used(batch.present, uniform.to(batch.present.device), self.at)

    def shown(self, batch: Batch) -> Batch:
        """The batch with features hidden at random, each record on its own (Srivastava et al. 2014, JMLR 15)."""
        hidden = self.scheme.hide_features
        if not hidden:
            return batch

        def some(features: Tensor) -> Tensor:
            kept = torch.from_numpy(self.draws.uniform(*features.shape) >= hidden).to(features.device)
            return torch.where(kept, features / (1 - hidden), 0.0)

        return replace(batch, inputs=batch.each_input(some))

    def objective(self, model: MultimodalModel, batch: Batch, used: Tensor) -> Tensor:
        """[R]: the loss of each record under the study's scheme, at this round."""
        return self.scheme.losses(model, batch, used, self.at)

    @cached_property
    def scheme(self) -> Scheme:
        """The study's."""
        return build_scheme(self.study)


class Sgd:
    """SGD with momentum on noised gradients: post-processing, so it costs no privacy.

    Not torch.optim: creating one imports the compiler stack, seconds in every message's process.

    Args:
        study: gives learning rate, momentum, weight decay and the proximal term.
        buffers: momentum by parameter name, continued from an earlier round.
        start: the shared parameters that the round began with, by parameter name; for the proximal term (Li et al.
            2020, arXiv 1812.06127), which reads parameters only and so costs no privacy.
        corrections: added to each gradient, by parameter name, as the server sent them (SCAFFOLD, Karimireddy et al.
            2020, arXiv 1910.06378).
    """

    def __init__(
        self,
        study: Study,
        buffers: Mapping[str, Tensor],
        start: Mapping[str, Tensor] | None = None,
        corrections: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._training, self._shrinkage = study.training, study.shrinkage
        # A server's corrections must not lead out of the bounds that its parameters are held to.
        self._bounded = study.privacy.enabled
        self.buffers = dict(buffers)
        self._start = dict(start or {})
        self._corrections = dict(corrections or {})

    def step(self, model: MultimodalModel, gradient: Mapping[str, Tensor]) -> None:
        """Change the model's parameters in place."""
        training, named = self._training, model.named
        parameters: list[Tensor] = list(named.values())
        with torch.no_grad():
            changes: Sequence[Tensor] = [gradient[name].to(parameter.device) for name, parameter in named.items()]
            if self._shrinkage:
                changes = torch._foreach_add(list(changes), parameters, alpha=self._shrinkage)
            if training.proximal and self._start:
                pulls = [
                    value - self._start[name] if name in self._start else torch.zeros_like(value)
                    for name, value in named.items()
                ]
                changes = torch._foreach_add(list(changes), pulls, alpha=training.proximal)
            if self._corrections:
                added = [self._corrections.get(name, torch.zeros_like(value)) for name, value in named.items()]
                changes = torch._foreach_add(list(changes), added)
            if training.momentum:
                before = [
                    self.buffers[name] if name in self.buffers else torch.zeros_like(named[name]) for name in named
                ]
                changes = torch._foreach_add(list(changes), before, alpha=training.momentum)
                self.buffers = dict(zip(named, changes, strict=True))
            torch._foreach_sub_(parameters, list(changes), alpha=training.lr)
            if self._bounded:
                torch._foreach_clamp_min_(parameters, -LARGEST)
                torch._foreach_clamp_max_(parameters, LARGEST)


def train(model: MultimodalModel, data: Batch, step: Step, optimizer: Sgd, steps: int) -> None:
    """Take local steps; the model changes in place."""
    for _ in range(steps):
        optimizer.step(model, step.gradient(data))
