"""What sites of one process that hold the same modalities can share: a model to be filled, and its gradient engine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch

from gapweave.client.gradients import GradientEngine
from gapweave.client.state import Groups
from gapweave.client.training import build_engine
from gapweave.shared.config import Study
from gapweave.shared.model import MultimodalModel, groups


class Network:
    """The model of sites that hold the same modalities, its public initial parameters, and its gradient engine.

    Virtual sites of one process share it: a model's parameters and constants are overwritten before each use.

    Args:
        study: what all sites agree on.
        held: modalities that the sites hold.
        device: where they train.
    """

    def __init__(self, study: Study, held: Sequence[str], device: torch.device) -> None:
        self._study = study
        self.model = MultimodalModel(study, held).to(device)
        self.initial: Groups = {
            group: {name: value.cpu().clone() for name, value in part.items()}
            for group, part in groups(self.model).items()
        }

    @cached_property
    def engine(self) -> GradientEngine:
        """Built when a site trains first."""
        return build_engine(self.model, self._study)


Networks = dict[tuple[str, tuple[str, ...], str], Network]
"""By study, modalities held, and device."""
