"""The loss: a function of one record, with known values, that supervises only what was hidden on purpose."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from batches import four_kinds, random_batch, random_model
from torch import Tensor

from gapweave.shared.imputers import IMPUTERS
from gapweave.shared.model import Outputs
from gapweave.shared.objective import probabilities, record_losses

KINDS = ["binary", "multiclass", "multilabel"]


def outputs(logits: Tensor, votes: Tensor, used: list[bool], present: list[bool], miss: float = 0.0) -> Outputs:
    """One record over two modalities; the imputer misses every embedding by `miss`."""
    embeddings = torch.full((1, 2, 4), 0.25)
    return Outputs(
        logits=logits,
        modality_logits=votes,
        embeddings=embeddings,
        imputed=embeddings + miss,
        present=torch.tensor([present]),
        used=torch.tensor([used]),
        weights=None,
    )


def loss(out: Outputs, target: list[float], kind: str, known: list[bool] | None = None) -> float:
    mask = torch.tensor([known or [True] * len(target)])
    return float(record_losses(out, torch.tensor([target]), mask, kind)[0])


BOTH, FIRST = [True, True], [True, False]


def test_an_undecided_binary_model_loses_log_2_for_the_fusion_and_log_2_for_its_heads() -> None:
    out = outputs(torch.zeros(1, 1), torch.zeros(1, 2, 1), BOTH, BOTH)
    assert loss(out, [1.0], "binary") == pytest.approx(2 * math.log(2))


def test_an_undecided_multiclass_model_loses_log_3_each() -> None:
    out = outputs(torch.zeros(1, 3), torch.zeros(1, 2, 3), BOTH, BOTH)
    assert loss(out, [0.0, 1.0, 0.0], "multiclass") == pytest.approx(2 * math.log(3))


def test_the_loss_of_a_known_score() -> None:
    out = outputs(torch.tensor([[2.0]]), torch.tensor([[[1.0], [3.0]]]), BOTH, BOTH)
    softplus = [math.log1p(math.exp(-score)) for score in (2.0, 1.0, 3.0)]
    assert loss(out, [1.0], "binary") == pytest.approx(softplus[0] + (softplus[1] + softplus[2]) / 2)


def test_only_modalities_in_use_are_asked_for_their_own_opinion() -> None:
    wrong = torch.tensor([[[0.0], [-50.0]]])
    out = outputs(torch.zeros(1, 1), wrong, FIRST, FIRST)
    assert loss(out, [1.0], "binary") == pytest.approx(2 * math.log(2))


def test_an_unknown_label_costs_nothing() -> None:
    out = outputs(torch.tensor([[9.0, -9.0]]), torch.full((1, 2, 2), 9.0), BOTH, BOTH)
    assert loss(out, [0.0, 1.0], "multilabel", [False, False]) == 0
    some = outputs(torch.zeros(1, 2), torch.zeros(1, 2, 2), BOTH, BOTH)
    assert loss(some, [0.0, 1.0], "multilabel", [True, False]) == pytest.approx(math.log(2))
    assert loss(some, [0.0, 1.0], "multiclass", [False, False]) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_value_behind_an_unknown_label_is_never_read(kind: str) -> None:
    study = four_kinds(task=kind)
    batch = random_batch(study)
    mask = batch.label_mask.clone()
    mask[::2] = False
    other = torch.where(mask, batch.target, 1 - batch.target)
    model = random_model(study)
    out = model(batch.inputs, batch.present, batch.present)
    parameters = list(model.parameters())
    first, second = (
        torch.autograd.grad(
            record_losses(out, target, mask, kind).sum(), parameters, retain_graph=True, allow_unused=True
        )
        for target in (batch.target, other)
    )
    assert all(one is None or torch.equal(one, two) for one, two in zip(first, second, strict=True))


def test_the_imputer_pays_for_modalities_hidden_on_purpose_only() -> None:
    logits, votes = torch.zeros(1, 1), torch.zeros(1, 2, 1)
    base = 2 * math.log(2)
    hidden = outputs(logits, votes, FIRST, BOTH, miss=0.5)
    assert loss(hidden, [1.0], "binary") == pytest.approx(base + 0.25)
    whole = outputs(logits, votes, BOTH, BOTH, miss=0.5)
    assert loss(whole, [1.0], "binary") == pytest.approx(base)
    lacking = outputs(logits, votes, FIRST, FIRST, miss=0.5)
    assert loss(lacking, [1.0], "binary") == pytest.approx(base)


def test_the_imputers_loss_counts_as_its_settings_say() -> None:
    cra = IMPUTERS["cra"]
    assert cra(2, 4).weight == 1
    weighed = cra(2, 4, cra.Settings(weight=3.0)).weight
    nothing = torch.zeros(1, 1), torch.zeros(1, 2, 1), FIRST, BOTH
    missed, exact = outputs(*nothing, miss=0.5), outputs(*nothing)
    heavier = replace(missed, imputer_weight=weighed)
    assert loss(heavier, [1.0], "binary") - loss(exact, [1.0], "binary") == pytest.approx(3 * 0.25)
    assert loss(missed, [1.0], "binary") - loss(exact, [1.0], "binary") == pytest.approx(0.25)


def test_the_imputers_target_is_detached() -> None:
    """Else the encoders collapse to what is easy to impute."""
    study = four_kinds("late", "cra")
    model = random_model(study)
    batch = random_batch(study, [1], present=torch.ones(1, 4, dtype=torch.bool))
    used = torch.tensor([[True, False, True, True]])
    out = model(batch.inputs, batch.present, used)
    record_losses(out, batch.target, batch.label_mask, "binary").sum().backward()
    assert not any(value.grad is not None and value.grad.any() for value in model.encoders["labs"].parameters()), (
        "the hidden modality's encoder learns nothing from being imputed"
    )
    assert all(value.grad.any() for value in model.imputer.parameters())


@pytest.mark.parametrize("imputer", list(IMPUTERS))
@pytest.mark.parametrize("kind", KINDS)
def test_a_records_loss_depends_on_that_record_only(kind: str, imputer: str) -> None:
    study = four_kinds("concat", imputer, kind)
    model, batch = random_model(study), random_batch(study, [1] * 6)
    used = batch.present & (torch.rand(batch.present.shape, generator=torch.Generator().manual_seed(2)) < 0.6)
    with torch.no_grad():
        together = record_losses(
            model(batch.inputs, batch.present, used), batch.target, batch.label_mask, study.task.kind
        )
        for row in range(6):
            one = batch.rows(torch.tensor([row]))
            alone = record_losses(
                model(one.inputs, one.present, used[[row]]), one.target, one.label_mask, study.task.kind
            )
            torch.testing.assert_close(alone[0], together[row], rtol=1e-5, atol=1e-6)
    assert together.shape == (6,)


def test_probabilities() -> None:
    binary = probabilities(torch.tensor([[0.0], [math.log(3)]]), "binary")
    torch.testing.assert_close(binary, torch.tensor([[0.5, 0.5], [0.25, 0.75]]))
    classes = probabilities(torch.tensor([[0.0, math.log(2), 0.0]]), "multiclass")
    torch.testing.assert_close(classes, torch.tensor([[0.25, 0.5, 0.25]]))
    labels = probabilities(torch.tensor([[0.0, math.log(3)]]), "multilabel")
    torch.testing.assert_close(labels, torch.tensor([[0.5, 0.75]]))


def test_a_loss_is_finite_for_any_finite_score() -> None:
    for kind, width in (("binary", 1), ("multiclass", 3), ("multilabel", 3)):
        extreme = torch.full((1, width), -1e4)
        extreme[0, 0] = 1e4
        out = outputs(extreme, extreme.unsqueeze(1).expand(1, 2, width), BOTH, BOTH)
        target = torch.zeros(1, width)
        target[0, -1] = float(width > 1)
        value = record_losses(out, target, torch.ones(1, width, dtype=torch.bool), kind)
        assert torch.isfinite(value).all()
        assert value[0] > 1e3
