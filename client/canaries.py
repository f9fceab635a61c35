"""Synthetic patients of a study's shapes: for whatever asks a model something before a patient's data are touched."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gapweave.shared.config.study import Study
from gapweave.shared.schema import Batch, modalities


def canaries(study: Study, held: Sequence[str], records: Sequence[int], seed: int = 0) -> Batch:
    """Synthetic patients of a study's shapes, with gaps; every record has something.

    Args:
        study: gives shapes and task.
        held: modalities of the site.
        records: number of records of each patient.
        seed: of the synthetic values; canaries are public, their seed hides nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    total, counts = sum(records), torch.tensor(records, dtype=torch.int64)
    inputs = {
        modality.name: torch.randn(total, *modality.shape, generator=generator)
        for modality in modalities(study)
        if modality.name in held
    }
    columns = torch.tensor([name in held for name in study.order])
    present = (torch.rand(total, len(study.order), generator=generator) < 0.7) & columns
    present[~present.any(1)] = columns
    target = torch.zeros(total, study.task.outputs)
    target[torch.arange(total), torch.randint(0, study.task.outputs, (total,), generator=generator)] = 1
    if study.task.kind != "multiclass":
        target = torch.randint(0, 2, target.shape, generator=generator).float()
    return Batch(
        inputs=inputs,
        present=present,
        target=target,
        label_mask=torch.ones_like(target, dtype=torch.bool),
        patient=torch.repeat_interleave(torch.arange(len(records)), counts),
        weight=torch.repeat_interleave(1 / counts.float(), counts),
        patients=len(records),
    )
