"""Mini-batches of whole blocks of records: how many patients were drawn must not decide how products are rounded.

A matrix product works on blocks of rows; rows that are left over take other instructions, whose sums differ in the last
bits; so do rows that begin in the middle of a line of memory, and the last numbers of a function's. Parameters may be
chosen so that these bits decide a loss: then one patient more or less changed the gradients of all who came after, and
the clipped sum by thirteen times the bound. Blocks are filled with records that weigh nothing, rows with zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from gapweave.shared.schema import Batch

BLOCKS = (16, 32, 64)
"""Records that a block may have; the last where no machine's word can be had."""

LINE = 16
"""Numbers of 4 bytes in a line of memory."""

FUNCTIONS = (torch.sigmoid, torch.tanh, torch.exp, functional.softplus, functional.logsigmoid, functional.silu)
"""Of single numbers, that a machine is asked about: it takes several numbers at once, and those left over otherwise."""

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


def align(model: nn.Module) -> None:
    """Let all linear layers of a model work on whole lines of memory."""
    for layer in model.modules():
        if type(layer) is nn.Linear:
            layer.forward = partial(_forward, layer)  # type: ignore[method-assign]


def _forward(layer: nn.Linear, inputs: Tensor) -> Tensor:
    return aligned(inputs, layer.weight, layer.bias)


def aligned(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """W x + b, of rows that all begin with a line of memory, forward and back.

    Args:
        inputs: [..., d].
        weight: [p, d].
        bias: [p], or None.
    """
    tall, wide = weight.shape
    more, beside = -wide % LINE, -tall % LINE
    if not more and not beside:
        return functional.linear(inputs.contiguous(), weight, bias)
    inputs = functional.pad(inputs, (0, more)) if more else inputs.contiguous()
    weight = functional.pad(weight, (0, more, 0, beside))
    bias = None if bias is None else functional.pad(bias, (0, beside))
    return functional.linear(inputs, weight, bias)[..., :tall]


@cache
def block_of(device: torch.device) -> int:
    """Records of a block on a device: the fewest by which it rounds rows alike, wherever among others they are.

    Asked once a process, of random numbers.
    """
    return next((size for size in BLOCKS if rounds_alike(size, device)), BLOCKS[-1])


def rounds_alike(size: int, device: torch.device, product: Product = torch.matmul) -> bool:
    """Whether rows of products and of functions have the same bits in whole blocks, however many, at any place."""
    generator = torch.Generator().manual_seed(size)
    for wide in WIDTHS:
        rows = torch.randn(16 * size, wide, generator=generator).to(device)
        if not all(_alike(function, rows, size) for function in FUNCTIONS):
            return False
        filled = functional.pad(rows, (0, -wide % LINE))
        for tall in WIDTHS:
            matrix = torch.randn(filled.shape[1], tall + -tall % LINE, generator=generator).to(device)
            if not _alike(lambda some, matrix=matrix: product(some, matrix), filled, size):  # type: ignore[misc]
                return False
    return True


def _alike(function: Callable[[Tensor], Tensor], rows: Tensor, size: int) -> bool:
    whole = function(rows)
    for blocks, gone in ((1, 0), (2, 1), (3, 2), (4, 3), (5, 5), (7, 7), (8, 0), (12, size - 1)):
        # The first are gone, and all others stand that much before where they stood.
        some = rows[gone : gone + size * blocks].contiguous()
        if not torch.equal(function(some), whole[gone : gone + size * blocks]):
            return False
    return True
