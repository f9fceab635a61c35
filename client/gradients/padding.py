"""Mini-batches of whole blocks of records: how many patients were drawn must not decide how products are rounded.

A matrix product works on blocks of rows; rows that are left over take other instructions, whose sums differ in the last
bits. Parameters may be chosen so that these bits decide a loss: then one patient more in a batch changed the gradients
of three others, and the clipped sum by four times the bound. Blocks are filled with records that weigh nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from gapweave.shared.schema import Batch

BLOCKS = (8, 16, 32)
"""Records that a block may have; the last where no machine's word can be had."""

WIDTHS = (1, 2, 5, 16, 33, 76, 128, 200)
"""Of layers that a machine is asked about, each with each."""

Product = Callable[[Tensor, Tensor], Tensor]


def padded(batch: Batch, used: Tensor) -> tuple[Batch, Tensor]:
    """The batch, filled up to whole blocks by patients of one record each, without content, label or weight.

    Args:
        batch: R records of P patients.
        used: [R, M] modalities that inform each record.

    Returns:
        Both with as many records as the next multiple of `block_of` this device.
    """
    more = -len(batch) % block_of(batch.patient.device)
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


@cache
def block_of(device: torch.device) -> int:
    """Records of a block on a device: the fewest by which its products round rows alike, however many blocks there are.

    Asked once a process, of random numbers. Few records matter where one is large: eight images cost half of sixteen.
    """
    return next((size for size in BLOCKS if rounds_alike(size, device)), BLOCKS[-1])


def rounds_alike(size: int, device: torch.device, product: Product = torch.matmul) -> bool:
    """Whether the first rows of products of whole blocks have the same bits, however many blocks there are."""
    most, generator = 16 * size, torch.Generator().manual_seed(size)
    for wide in WIDTHS:
        rows = torch.randn(most, wide, generator=generator).to(device)
        for tall in WIDTHS:
            weight = torch.randn(tall, wide, generator=generator).to(device)
            # As a layer multiplies on its way forward, and back.
            for matrix in (weight.T, weight.reshape(wide, tall)):
                whole = product(rows, matrix)
                for blocks in (1, 2, 3, 4, 5, 7, 8, 12):
                    if not torch.equal(product(rows[: size * blocks], matrix), whole[: size * blocks]):
                        return False
    return True
