"""Intermediate fusion by a recurrent network over the modalities."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from gapweave.shared.fusion import FUSIONS, Fused, Fusion, Shape
from gapweave.shared.fusion.parts import Docks, Head, HiddenSettings


class RecurrentSettings(HiddenSettings):
    """Size of the state."""

    state: int = Field(16, ge=1, le=1024, description="width of the state")


@FUSIONS.register("medfuse")
class RecurrentFusion(Fusion):
    """An LSTM reads the modalities that are there one after the other; its last state decides.

    Reference: Hayat et al. 2022, "MedFuse: Multi-modal Fusion with Clinical Time-Series Data and Chest X-ray Images"
        (MLHC)
    Form: g(h), h the last state of an LSTM over W_m v^m + b_m of the used m in alphabetical order; an absent modality
        is no step. The cell is one linear map of [input, state], with forget gates from 1
    Couples: nothing
    """

    Settings = RecurrentSettings
    reads_slots = False

    def __init__(self, shape: Shape, settings: RecurrentSettings | None = None) -> None:
        super().__init__(shape)
        settings = settings or RecurrentSettings()
        self.state = settings.state
        self.docks = Docks(shape.modalities, shape.embedding, shape.embedding)
        self.gates = nn.Linear(shape.embedding + settings.state, 4 * settings.state)
        nn.init.ones_(self.gates.bias[: settings.state])
        self.head = Head(settings.state, shape.outputs, settings.hidden)

    def forward(self, slots: Tensor, used: Tensor, modality_logits: Tensor) -> Fused:
        """Read and decide."""
        docked = self.docks(slots, used)
        state = memory = docked.new_zeros(len(docked), self.state)
        for at in range(docked.shape[1]):
            here = used[:, [at]]
            forget, admit, show, new = self.gates(torch.cat([docked[:, at], state], -1)).chunk(4, -1)
            written = torch.sigmoid(forget) * memory + torch.sigmoid(admit) * torch.tanh(new)
            memory = torch.where(here, written, memory)
            state = torch.where(here, torch.sigmoid(show) * torch.tanh(written), state)
        return Fused(logits=self.head(state), weights=None)
