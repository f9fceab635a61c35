"""Whole blocks of records: what fills them up changes nothing, and nobody's loss depends on how many others there are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from batches import four_kinds, random_batch, random_model, tasks_of
from torch import Tensor

from gapweave.client.gradients import plain_objective
from gapweave.client.gradients.padding import BLOCKS, align, aligned, block_of, padded, rounds_alike
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


@pytest.mark.parametrize("fusion", [name for name in FUSIONS if FUSIONS[name].__module__.startswith("gapweave.")])
def test_no_bit_of_a_loss_depends_on_who_came_before(fusion: str) -> None:
    """Without rows that begin with a line of memory they did in all 28 fusions (one CPU)."""
    of = four_kinds(fusion, "cra", tasks_of(fusion)[0])
    model, batch, objective = random_model(of), random_batch(of, [1] * 129, seed=3), plain_objective(of.task.kind)
    align(model)

    def losses(gone: int) -> Tensor:
        some = batch.of_patients(torch.arange(gone, 129))
        whole, used = padded(some, some.present)
        with torch.no_grad():
            return objective(model, whole, used)[: len(some)]

    everybody = losses(0)
    for gone in (1, 2, 3, 5, 8, 16):
        assert torch.equal(losses(gone), everybody[gone:]), gone


@pytest.mark.parametrize("keys", [{}, {"linear_path": True, "feature_norm": 10}])
def test_no_bit_of_a_feature_depends_on_who_came_before(keys: dict[str, Any]) -> None:
    of = four_kinds("late", "none")
    of = of.model_copy(update={"model": of.model.model_copy(update=keys)})
    model, batch = random_model(of), random_batch(of, [1] * 101, seed=3)
    everybody = model.features(batch.inputs, batch.present)
    for gone in (1, 2, 3, 5, 8):
        some = batch.of_patients(torch.arange(gone, 101))
        found = model.features(some.inputs, some.present)
        assert all(torch.equal(found[name], everybody[name][gone:]) for name in everybody)


@pytest.mark.parametrize(("wide", "tall"), [(5, 4), (16, 32), (51, 8), (33, 1)])
def test_an_aligned_product_is_the_product_forward_and_back(wide: int, tall: int) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((7, 3, wide), (tall, wide), (tall,))
    )
    found, expected = aligned(inputs, weight, bias), torch.nn.functional.linear(inputs, weight, bias)
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad(found.square().sum(), (inputs, weight, bias)),
        torch.autograd.grad(expected.square().sum(), (inputs, weight, bias)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


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
