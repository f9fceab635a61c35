"""Whole blocks of records: what fills them up changes nothing, and nobody's loss depends on how many others there are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from batches import four_kinds, random_batch, random_model, tasks_of
from torch import Tensor

from gapweave.client.gradients import plain_objective
from gapweave.client.gradients.padding import BLOCKS, block_of, padded, rounds_alike
from gapweave.shared.fusion import FUSIONS
from gapweave.shared.schema import Batch

CPU = torch.device("cpu")
BLOCK = block_of(CPU)


def first(batch: Batch, patients: int) -> Batch:
    return replace(batch.rows(torch.arange(patients)), patients=patients)


@pytest.mark.parametrize("records", [[1] * 5, [2, 1, 3], [1] * BLOCK, [4] * BLOCK])
def test_a_block_is_filled_with_patients_who_are_nobody(records: list[int]) -> None:
    batch = random_batch(four_kinds(), records)
    whole, used = padded(batch, batch.present)
    assert len(whole) == len(used) == -(-len(batch) // BLOCK) * BLOCK
    more = len(whole) - len(batch)
    assert whole.patients == batch.patients + more
    assert whole.patient[len(batch) :].tolist() == list(range(batch.patients, whole.patients))
    for filled in (whole.weight, whole.present, whole.label_mask, whole.target, used, *whole.inputs.values()):
        assert not filled[len(batch) :].any()
    assert all(torch.equal(whole.inputs[name][: len(batch)], rows) for name, rows in batch.inputs.items())


@pytest.mark.parametrize("fusion", [name for name in FUSIONS if FUSIONS[name].__module__.startswith("gapweave.")])
def test_no_bit_of_a_loss_depends_on_how_many_others_there_are(fusion: str) -> None:
    """In batches as they are drawn they did in 19 of 28 fusions (one CPU)."""
    of = four_kinds(fusion, "cra", tasks_of(fusion)[0])
    model, batch, objective = random_model(of), random_batch(of, [1] * 129, seed=3), plain_objective(of.task.kind)

    def losses(count: int) -> Tensor:
        whole, used = padded(some := first(batch, count), some.present)
        with torch.no_grad():
            return objective(model, whole, used)[:count]

    everybody = losses(129)
    for count in (1, 5, 15, 16, 17, 33, 48, 64, 100, 128):
        assert torch.equal(losses(count), everybody[:count]), count


@pytest.mark.parametrize("rows_at_once", [3, 8, 16, 64])
def test_a_block_is_whole_rows_of_products(rows_at_once: int) -> None:
    """A machine whose products take so many rows at a time, and round what is left over in another way."""

    def product(rows: Tensor, matrix: Tensor) -> Tensor:
        result = (rows.double() @ matrix.double()).float()
        result[len(rows) // rows_at_once * rows_at_once :] *= 1 + 2.0**-22
        return result

    for size in BLOCKS:
        assert rounds_alike(size, CPU, product) == (size % rows_at_once == 0), size


def test_this_machine_has_a_block() -> None:
    assert rounds_alike(BLOCK, CPU)
