"""Mini-batches of whole blocks of records: how many patients were drawn must not decide how products are rounded.

A matrix product works on blocks of rows; rows that are left over take other instructions, whose sums differ in the last
bits. Parameters may be chosen so that these bits decide a loss: then one patient more in a batch changed the gradients
of three others, and the clipped sum by four times the bound. Blocks are filled with records that weigh nothing.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gapweave.shared.schema import Batch

BLOCK = 16
"""Records of a block, a multiple of the rows that products on CPUs work on at a time."""


def padded(batch: Batch, used: Tensor) -> tuple[Batch, Tensor]:
    """The batch, filled up to whole blocks by patients of one record each, without content, label or weight.

    Args:
        batch: R records of P patients.
        used: [R, M] modalities that inform each record.

    Returns:
        Both with the next multiple of `BLOCK` records.
    """
    more = -len(batch) % BLOCK
    if not more:
        return batch, used

    def filled(values: Tensor) -> Tensor:
        return torch.cat([values, values.new_zeros(more, *values.shape[1:])])

    patients = torch.arange(batch.patients, batch.patients + more, device=batch.patient.device)
    whole = replace(
        batch,
        inputs=batch.each_input(filled),
        present=filled(batch.present),
        target=filled(batch.target),
        label_mask=filled(batch.label_mask),
        patient=torch.cat([batch.patient, patients]),
        weight=filled(batch.weight),
        patients=batch.patients + more,
    )
    return whole, filled(used)
