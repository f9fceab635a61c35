"""Does one patient's data change another's loss? Asked of synthetic patients before the first step."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gapweave.shared.errors import UsageError
from gapweave.shared.model import MultimodalModel
from gapweave.shared.schema import Batch
from gapweave.shared.schemes import Objective

PROBES = 4
"""Patients of the synthetic batch."""


def synthetic(model: MultimodalModel, like: Batch) -> Batch:
    """Records of `PROBES` synthetic patients; of the batch only the shapes are taken."""
    generator = torch.Generator().manual_seed(0)
    device = like.present.device
    inputs = like.each_input(
        lambda value: torch.randn(PROBES, *value.shape[1:], generator=generator).to(device=device, dtype=value.dtype)
    )
    held = torch.tensor([name in inputs for name in model.order], device=device)
    present = held.expand(PROBES, -1)
    target = torch.zeros(PROBES, like.target.shape[1], device=device, dtype=like.target.dtype)
    target[:, 0] = 1
    return replace(
        like,
        inputs=inputs,
        present=present,
        target=target,
        label_mask=torch.ones_like(target, dtype=torch.bool),
        patient=torch.arange(PROBES, device=device),
        weight=torch.ones(PROBES, device=device, dtype=like.weight.dtype),
        patients=PROBES,
    )


def probe_independence(model: MultimodalModel, objective: Objective, like: Batch) -> None:
    """Replace one record by other values: the losses of all others must stay bit for bit.

    Args:
        model: of the site.
        objective: the loss of each record.
        like: a batch, of which only the shapes are taken.

    Raises:
        UsageError: when records are coupled, so that per-patient clipping would mean nothing.
    """
    probe = synthetic(model, like)
    others = probe.each_input(lambda value: torch.cat([-3 * value[:1], value[1:]]))
    alone = probe.present.clone()
    alone[0] = False
    before = _probe_losses(model, objective, probe)
    for changed in (replace(probe, inputs=others), replace(probe, present=alone)):
        if not torch.equal(before[1:], _probe_losses(model, objective, changed)[1:]):
            raise UsageError(
                "one patient's values change another's loss: per-patient clipping would protect nobody",
                where="study:model",
                remedy="Remove what couples the rows of a batch (a batch mean, a batch norm, attention over patients)",
            )


def _probe_losses(model: MultimodalModel, objective: Objective, probe: Batch) -> Tensor:
    with torch.no_grad():
        return objective(model, probe, probe.present)
