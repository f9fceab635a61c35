"""A site's model and how it learns: the arithmetic of a round and of fine-tuning.

Nothing here asks for permission, charges a budget or writes a file: that is the participant's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

import torch

from gapweave.client.finetuning import Gate, fine_tune
from gapweave.client.gradients import GradientEngine
from gapweave.client.gradients.probe import probe_independence
from gapweave.client.network import Network, Networks
from gapweave.client.state import Groups, RoundState, to_arrays, to_tensors
from gapweave.client.training import Sgd, Step, train
from gapweave.shared.config import Study
from gapweave.shared.constants import Constants
from gapweave.shared.messages import split_corrections
from gapweave.shared.model import MultimodalModel, group_of, groups, load_groups, shared_groups
from gapweave.shared.privacy.draws import Draws, SecretDraws, SeededDraws
from gapweave.shared.privacy.plan import Plan
from gapweave.shared.schema import Batch
from gapweave.shared.schemes import Moment
from gapweave.shared.tensorfile import Arrays


class Learner:
    """What trains at a site.

    Args:
        study: what all sites agree on.
        site: name of the site; without privacy its draws follow from it.
        held: modalities of the site.
        device: where it trains.
        training: gives the training patients, when they are needed first.
        networks: models that sites of this process share; None for a site of its own.

    Attributes:
        constants: what of the data the model was told, released before; it gets them with its parameters.
    """

    def __init__(
        self,
        study: Study,
        site: str,
        held: Sequence[str],
        device: torch.device,
        training: Callable[[], Batch],
        networks: Networks | None = None,
    ) -> None:
        self._study, self._site, self._held, self._device = study, site, held, device
        self._training = training
        self._networks: Networks = {} if networks is None else networks
        self.constants = Constants()
        self._features: tuple[Constants, Batch] | None = None

    @cached_property
    def _network(self) -> Network:
        key = (self._study.sha256, tuple(self._held), str(self._device))
        if key not in self._networks:
            self._networks[key] = Network(self._study, self._held, self._device)
        return self._networks[key]

    @cached_property
    def model(self) -> MultimodalModel:
        """The site's model; its parameters and constants are overwritten before each use."""
        return self._network.model

    @cached_property
    def initial(self) -> Groups:
        """The public initial parameters."""
        return self._network.initial

    @cached_property
    def shared(self) -> list[str]:
        """Groups that this site sends and receives."""
        return shared_groups(self._study, self.initial)

    @cached_property
    def engine(self) -> GradientEngine:
        """Sums what patients' records say, clipped."""
        return self._network.engine

    def draws(self, number: int | str) -> Draws:
        """What samples patients and makes noise in a round, or in fine-tuning: secret wherever there is privacy."""
        if self._study.privacy.enabled:
            return SecretDraws()
        return SeededDraws(self._study.seed, self._site, number)

    def load(self, before: RoundState, received: Groups) -> MultimodalModel:
        """The model with the groups that the site kept and those that it received."""
        self.model.constants = self.constants
        load_groups(self.model, {**self.initial, **to_tensors(before.private), **received})
        return self.model

    def round(self, plan: Plan, number: int, request: str, before: RoundState, received: Arrays) -> RoundState:
        """One round's steps.

        Args:
            plan: of the run.
            number: of the round, from 1.
            request: hash of the whole request.
            before: the state after the round before.
            received: the shared groups, and with SCAFFOLD corrections of some of them.

        Returns:
            The state after it; its `reply` is the change of the shared groups.
        """
        shared, corrections = split_corrections(received)
        start = to_tensors(shared)
        self.load(before, start)
        pulled = self._by_parameter(shared) if self._study.training.proximal else None
        optimizer = Sgd(self._study, self._by_parameter(before.momentum), pulled, self._by_parameter(corrections))
        step = self._step(plan, number, number)
        train(self.model, self._ready(step), step, optimizer, plan.steps)
        trained = groups(self.model)
        update = {
            group: {name: trained[group][name].cpu() - value for name, value in part.items()}
            for group, part in start.items()
        }
        momentum: Groups = {}
        for parameter, value in optimizer.buffers.items():
            group, name = group_of(parameter)
            momentum.setdefault(group, {})[name] = value
        return RoundState(
            round=number,
            request=request,
            event=plan.event(f"update of round {number}").to_dict(),
            private=to_arrays({group: part for group, part in trained.items() if group not in self.shared}),
            momentum=to_arrays(momentum),
            reply=to_arrays(update),
        )

    def fine_tune(self, plan: Plan, ids: Sequence[str]) -> Gate:
        """Train on from what was loaded last; the model changes in place.

        Args:
            plan: of the run; the event of fine-tuning is charged.
            ids: of the training patients.
        """
        step = self._step(plan, "fine-tuning", self._study.training.rounds)
        return fine_tune(self.model, self._ready(step), ids, step)

    def _step(self, plan: Plan, draws: int | str, number: int) -> Step:
        return Step(
            study=self._study,
            plan=plan,
            engine=self.engine,
            draws=self.draws(draws),
            at=Moment(number, self._study.training.rounds),
        )

    def _by_parameter(self, arrays: Arrays) -> dict[str, torch.Tensor]:
        """Groups' tensors by parameter name, on the site's device."""
        if not arrays:
            return {}
        stored, result = to_tensors(arrays), {}
        for parameter in self.model.named:
            group, name = group_of(parameter)
            if name in stored.get(group, {}):
                result[parameter] = stored[group][name].to(self._device)
        return result

    def _ready(self, step: Step) -> Batch:
        """The training patients as the encoders read them; done once, since the model's constants stay."""
        constants, ready = self._features or (None, None)
        if ready is None or constants != self.constants:
            data = self._training()
            if self._study.privacy.enabled:
                # Before features are taken: engines see what is left to the encoders only.
                probe_independence(self.model, step.objective, data)
            ready = replace(data, inputs=self.model.features(data.inputs, data.present))
            self._features = (self.constants, ready)
        return ready
