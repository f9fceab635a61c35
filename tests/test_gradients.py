"""Clipped sums of patients' gradients, against a naive loop over patients, and their sensitivity."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from batches import LABS, PAIRS, TRIPLES, flat, four_kinds, length, random_batch, random_model
from cohorts import study
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gapweave.client.gradients.fast import SLACK as FAST_SLACK
from gapweave.client.gradients.fast import FastEngine
from gapweave.client.gradients.opacus import OpacusEngine
from gapweave.client.gradients.plain import PlainEngine
from gapweave.shared.config.study import Study
from gapweave.shared.encoders import ENCODERS
from gapweave.shared.errors import UsageError
from gapweave.shared.fusion import FUSIONS
from gapweave.shared.model import MultimodalModel
from gapweave.shared.objective import record_losses
from gapweave.shared.schema import Batch

few = settings(derandomize=True, deadline=None, max_examples=8)
BOUND = 0.5
# Of the declared sensitivity: what the fast engine grants to rounding, and the last bits of a float32 norm.
SLACK = (1 + FAST_SLACK) * (1 + 1e-6)

Private: type[OpacusEngine] | type[FastEngine] = OpacusEngine
"""The engine under test; every test of this file runs with each."""


@pytest.fixture(scope="module", autouse=True, params=[OpacusEngine, FastEngine], ids=["opacus", "fast"])
def _engine(request: pytest.FixtureRequest) -> None:
    global Private
    Private = request.param


def double(batch: Batch) -> Batch:
    inputs = {name: values.double() for name, values in batch.inputs.items()}
    return replace(batch, inputs=inputs, target=batch.target.double(), weight=batch.weight.double())


def hide_some(batch: Batch, seed: int = 1) -> Tensor:
    """Which modalities are used: what records have, less some that are hidden on purpose."""
    draw = torch.rand(batch.present.shape, generator=torch.Generator().manual_seed(seed))
    return batch.present & (draw < 0.7)


def one_patient(model: MultimodalModel, of: Study, batch: Batch, used: Tensor, patient: int) -> Tensor:
    """The gradient of one patient's own records, by autograd, one record at a time."""
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(value) for name, value in parameters.items()}
    for row in (batch.patient == patient).nonzero()[:, 0]:
        if batch.weight[row] == 0:
            continue
        record = batch.rows(row.view(1))
        outputs = model(record.inputs, record.present, used[row].view(1, -1))
        value = record_losses(outputs, record.target, record.label_mask, of.task.kind)[0] * record.weight[0]
        for name, gradient in zip(
            total, torch.autograd.grad(value, list(parameters.values()), allow_unused=True), strict=True
        ):
            if gradient is not None:
                total[name] += gradient
    return flat(total)


def naive(model: MultimodalModel, of: Study, batch: Batch, used: Tensor, bound: float) -> Tensor:
    """Sum over patients of the clipped gradient; one that is not finite counts as zero."""
    result = torch.zeros(sum(value.numel() for value in model.parameters()), dtype=torch.float64)
    for patient in range(batch.patients):
        gradient = one_patient(model, of, batch, used, patient)
        norm = gradient.norm()
        if torch.isfinite(norm):
            result += gradient * min(1.0, bound / max(float(norm), 1e-12))
    return result


def assert_equals_naive(of: Study, batch: Batch, used: Tensor | None = None, bound: float = BOUND) -> Tensor:
    used = batch.present if used is None else used
    plain, hooked = random_model(of).double(), random_model(of).double()
    expected = naive(plain, of, double(batch), used, bound)
    found = flat(Private(hooked, of.task.kind, bound).sum(double(batch), used))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    single = flat(Private(random_model(of), of.task.kind, bound).sum(batch, used))
    assert length(single - expected) <= 1e-5 * max(1.0, length(expected)), "in float32, as sites train"
    return found


# Against the naive loop.


@pytest.mark.no_cover
@pytest.mark.parametrize(("fusion", "imputer", "task"), TRIPLES)
def test_the_sum_equals_a_loop_over_patients(fusion: str, imputer: str, task: str) -> None:
    """One to five records a patient, some modalities missing, some hidden on purpose."""
    of = four_kinds(fusion, imputer, task)
    batch = random_batch(of, [3, 1, 5, 2, 4])
    found = assert_equals_naive(of, batch, hide_some(batch))
    assert length(found) > 0


def test_clipping_is_at_work_and_so_is_its_absence() -> None:
    of = four_kinds("concat")
    batch = random_batch(of, [2, 1, 3])
    norms = [length(one_patient(random_model(of), of, batch, batch.present, patient)) for patient in range(3)]
    assert_equals_naive(of, batch, bound=0.5 * min(norms))
    middle = sorted(norms)[1]
    assert_equals_naive(of, batch, bound=middle)
    loose = assert_equals_naive(of, batch, bound=2 * max(norms))
    plain = flat(PlainEngine(random_model(of).double(), "binary").sum(double(batch), batch.present))
    torch.testing.assert_close(loose, plain, rtol=1e-7, atol=1e-10)


def test_all_modalities_there_and_one_only() -> None:
    of = four_kinds("concat")
    assert_equals_naive(of, random_batch(of, [1] * 4, present=torch.ones(4, 4, dtype=torch.bool)))
    for modality in range(4):
        present = torch.zeros(4, 4, dtype=torch.bool)
        present[:, modality] = True
        assert_equals_naive(of, random_batch(of, [1, 2, 1], present=present))


def test_a_batch_of_one_patient() -> None:
    of = four_kinds()
    assert_equals_naive(of, random_batch(of, [1]))
    assert_equals_naive(of, random_batch(of, [5]))


def test_an_empty_batch_gives_zeros_for_every_parameter() -> None:
    of = four_kinds()
    model = random_model(of)
    batch = random_batch(of).of_patients(torch.zeros(0, dtype=torch.int64))
    for engine in (Private(model, "binary", BOUND), PlainEngine(random_model(of), "binary")):
        gradient = engine.sum(batch, batch.present)
        assert gradient.keys() == dict(model.named_parameters()).keys()
        assert all(not tensor.any() and tensor.shape for tensor in gradient.values())


def test_a_record_without_a_label_or_modality_counts_for_nothing() -> None:
    of = four_kinds()
    batch = random_batch(of, [2, 2])
    weight, mask = batch.weight.clone(), batch.label_mask.clone()
    weight[1], mask[1] = 0, False
    batch = replace(batch, weight=weight, label_mask=mask)
    assert_equals_naive(of, batch)
    emptied = replace(batch, present=batch.present & (batch.weight > 0).unsqueeze(1))
    assert_equals_naive(of, emptied)


def test_records_of_one_patient_need_not_stand_together() -> None:
    of = four_kinds("concat")
    batch = random_batch(of, [3, 2, 4])
    apart = batch.rows(torch.tensor([0, 4, 8, 1, 3, 7, 2, 5, 6]))
    assert_equals_naive(of, apart)


def test_two_calls_do_not_remember_each_other() -> None:
    of = four_kinds()
    engine = Private(random_model(of), "binary", BOUND)
    batch, other = random_batch(of, [2, 1]), random_batch(of, [1, 3, 1], seed=8)
    first = flat(engine.sum(batch, batch.present))
    engine.sum(other, other.present)
    assert torch.equal(flat(engine.sum(batch, batch.present)), first)


# Patients that go wrong.


@pytest.mark.no_cover
@pytest.mark.parametrize(
    ("fusion", "value", "kinds"),
    [
        *(("concat", value, ("cxr", "labs", "note", "vitals")) for value in (float("nan"), float("inf"), 1e30, 3e38)),
        *((fusion, float("nan"), ("labs",)) for fusion in FUSIONS),
    ],
    ids=str,
)
def test_a_patient_with_a_broken_gradient_contributes_exactly_zero(
    fusion: str, value: float, kinds: tuple[str, ...]
) -> None:
    """In every kind of data; and nobody else notices."""
    of = four_kinds(fusion, "cra")
    batch = random_batch(of, [1, 2, 1], present=torch.ones(4, 4, dtype=torch.bool))
    rest = batch.of_patients(torch.tensor([0, 2]))
    expected = flat(Private(random_model(of), "binary", BOUND).sum(rest, rest.present))
    for name in kinds:
        broken = batch.inputs[name].clone()
        broken[1] = value
        engine = Private(random_model(of), "binary", BOUND)
        bad = replace(batch, inputs={**batch.inputs, name: broken})
        found = flat(engine.sum(bad, bad.present))
        assert torch.isfinite(found).all()
        alone = bad.of_patients(torch.tensor([1]))
        contribution = flat(engine.sum(alone, alone.present))
        assert length(contribution) <= BOUND * SLACK
        torch.testing.assert_close(found, expected + contribution, rtol=0, atol=1e-6)
        if value != value:
            assert not contribution.any()
            assert_equals_naive(of, bad)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_a_patient_with_a_broken_label_contributes_exactly_zero(value: float) -> None:
    of = four_kinds()
    batch = random_batch(of, [1, 1, 1])
    target = batch.target.clone()
    target[1] = value
    found = flat(Private(random_model(of), "binary", BOUND).sum(replace(batch, target=target), batch.present))
    rest = batch.of_patients(torch.tensor([0, 2]))
    expected = flat(Private(random_model(of), "binary", BOUND).sum(rest, rest.present))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_gradient_that_overflows_counts_as_broken() -> None:
    """Its loss is finite, and nothing in it is NaN: scaled down to the bound, infinity would become NaN."""
    of = four_kinds("late", "none")
    present = torch.zeros(3, 4, dtype=torch.bool)
    present[:, of.order.index("labs")] = True
    batch = random_batch(of, [1, 1, 1], present=present)
    batch.inputs["labs"][1] = 9.0
    target = batch.target.clone()
    target[1] = 1.2e38

    def unsaturated() -> MultimodalModel:
        model = random_model(of)
        with torch.no_grad():
            model.encoders["labs"].wide.weight.zero_()
            model.encoders["labs"].deep.weight.zero_()
        return model

    bad = replace(batch, target=target)
    gradient = one_patient(unsaturated(), of, bad, present, 1)
    assert torch.isinf(gradient).any()
    assert not torch.isnan(gradient).any()
    rest = batch.of_patients(torch.tensor([0, 2]))
    found = flat(Private(unsaturated(), "binary", BOUND).sum(bad, present))
    expected = flat(Private(unsaturated(), "binary", BOUND).sum(rest, rest.present))
    # The fast engine never forms the product that overflows: it may clip this patient instead of leaving him out.
    assert torch.isfinite(found).all()
    assert length(found - expected) <= (1e-6 if Private is OpacusEngine else BOUND * SLACK)


def cancelling() -> tuple[Study, MultimodalModel, Batch]:
    """Two patients who differ in their label only, under a model that is undecided."""
    of = four_kinds("late", "none")
    model = random_model(of)
    with torch.no_grad():
        for head in (*model.heads.values(), model.fusion.intercept):
            for parameter in head.parameters():
                parameter.zero_()
    one = random_batch(of, [1])
    both = one.rows(torch.tensor([0, 0]))
    return of, model, replace(both, patient=torch.tensor([0, 1]), patients=2, target=torch.tensor([[0.0], [1.0]]))


def test_patients_who_cancel_are_clipped_before_they_cancel() -> None:
    of, model, batch = cancelling()
    engine = Private(model, of.task.kind, bound=0.1)
    assert length(flat(engine.sum(batch, batch.present))) < 1e-6
    for patient in (0, 1):
        alone = batch.of_patients(torch.tensor([patient]))
        assert length(flat(engine.sum(alone, alone.present))) == pytest.approx(0.1, rel=1e-6)


# Guarantee.


@few
@given(
    seed=st.integers(0, 999),
    records=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    size=st.sampled_from([1e-3, 1.0, 1e3, 1e18]),
    bound=st.sampled_from([1e-3, 0.3, 10.0]),
)
def test_one_patient_more_or_less_changes_the_sum_by_at_most_the_bound(
    seed: int, records: list[int], size: float, bound: float
) -> None:
    of = four_kinds("concat", "cra")
    batch = random_batch(of, records, seed=seed)
    batch = replace(batch, inputs={name: size * values for name, values in batch.inputs.items()})
    used = hide_some(batch, seed)
    engine = Private(random_model(of), "binary", bound)
    everyone = flat(engine.sum(batch, used))
    for patient in range(batch.patients):
        rows = batch.patient != patient
        kept = torch.tensor([other for other in range(batch.patients) if other != patient], dtype=torch.int64)
        without = flat(engine.sum(batch.of_patients(kept), used[rows]))
        # Float32 gradients of the same patient differ in their last bits between batches.
        assert length(everyone - without) <= bound * (SLACK + 1e-5)
        alone = flat(engine.sum(batch.of_patients(torch.tensor([patient])), used[~rows]))
        assert length(alone) <= bound * SLACK


def test_one_patients_records_do_not_decide_how_all_others_are_clipped() -> None:
    """Uses that cancel: the two forms of a layer's norm differ for everybody, whichever one patient's records choose."""
    of = study({name: LABS for name in "abcd"}, model={"embedding": 16, "fusion": "cross_attention", "imputer": "none"})
    model, generator = MultimodalModel(of, of.order), torch.Generator().manual_seed(1)
    fusion = model.fusion
    with torch.no_grad():
        for dock in fusion.docks.layers:
            dock.weight.copy_(0.0025 * torch.randn(dock.weight.shape, generator=generator))
            dock.bias.fill_(1000)
        fusion.key.weight.zero_()
        fusion.latents.table.weight.fill_(1000)
        fusion.query.weight.copy_(1000 * torch.eye(len(fusion.query.weight)))
        fusion.value.weight.copy_(250 * torch.randn(fusion.value.weight.shape, generator=generator))
        fusion.value.weight -= fusion.value.weight.mean(1, keepdim=True)
    batch = random_batch(of, [1] * 64 + [8], present=torch.ones(72, 4, dtype=torch.bool))
    inputs = {name: torch.cat([rows[:1].expand(64, -1), rows[64:]]) for name, rows in batch.inputs.items()}
    batch = replace(batch, inputs=inputs, target=torch.cat([torch.ones(64, 1), batch.target[64:]]))
    less = batch.of_patients(torch.arange(64))
    engine = Private(model, "binary", 1.0)
    change = flat(engine.sum(batch, batch.present)) - flat(engine.sum(less, less.present))
    assert length(change) <= SLACK


def test_who_leaves_does_not_decide_how_all_others_are_rounded() -> None:
    """Parameters for which the last bits of a sum decide a loss; without the first patient all others move by a row."""
    of = study({name: LABS for name in "abc"}, model={"embedding": 16, "fusion": "autoencoder", "imputer": "none"})
    model, generator = MultimodalModel(of, of.order), torch.Generator().manual_seed(0)
    fusion, mask, spread = model.fusion, torch.zeros(3), 0.0
    for _ in range(5000):  # weights of the mask whose sum of rows depends on where the row begins
        one = 2000 * torch.rand(3, generator=generator) - 1000
        one[2] = -one[0] - one[1]
        rows, weight = torch.zeros(8, 51), torch.zeros(8, 51)
        rows[:, 48:], weight[:, 48:] = 1, one
        sums = nn.functional.linear(rows, weight)[:, 0]
        if one.abs().max() <= 1000 and sums.max() - sums.min() > spread:
            mask, spread = one, float(sums.max() - sums.min())
    with torch.no_grad():
        for value in (fusion.encode.weight, fusion.encode.bias, fusion.decode.weight, fusion.decode.bias):
            value.zero_()
        fusion.encode.weight[:, 48:] = mask
        fusion.head.wide.weight.zero_()
        fusion.head.wide.bias.fill_(-500)
        fusion.head.hidden.weight.fill_(-1000)
        fusion.head.hidden.bias.zero_()
        fusion.head.deep.weight.fill_(100)
        fusion.head.deep.bias.zero_()
    batch = random_batch(of, [1] * 65, present=torch.ones(65, 3, dtype=torch.bool))
    batch = replace(batch, target=torch.zeros_like(batch.target))
    batch.present[torch.arange(65) % 4 != 3, 2] = False
    less = batch.of_patients(torch.arange(1, 65))
    engine = Private(model, "binary", 1.0)
    change = flat(engine.sum(batch, batch.present)) - flat(engine.sum(less, less.present))
    assert length(change) <= SLACK


@few
@given(order=st.permutations(range(9)), relabel=st.permutations(range(5)))
def test_the_order_of_records_and_patients_changes_nothing(order: list[int], relabel: list[int]) -> None:
    of = four_kinds("concat", "cra")
    batch = random_batch(of, [1, 2, 3, 1, 2])
    used, rows = hide_some(batch), torch.tensor(order)
    engine = Private(random_model(of), "binary", BOUND)
    straight = flat(engine.sum(batch, used))
    shuffled = batch.rows(rows)
    shuffled = replace(shuffled, patient=torch.tensor(relabel)[shuffled.patient])
    assert length(flat(engine.sum(shuffled, used[rows])) - straight) <= 1e-6 * length(straight)


# The engine without privacy.


@pytest.mark.parametrize(("fusion", "imputer"), PAIRS)
def test_the_plain_engine_equals_autograd(fusion: str, imputer: str) -> None:
    of = four_kinds(fusion, imputer)
    batch = random_batch(of, [2, 1, 3])
    used = hide_some(batch)
    model = random_model(of).double()
    found = flat(PlainEngine(model, "binary").sum(double(batch), used))
    one_by_one = torch.stack([one_patient(model, of, double(batch), used, patient) for patient in range(3)]).sum(0)
    torch.testing.assert_close(found, one_by_one, rtol=1e-9, atol=1e-12)


def test_a_modality_that_nobody_has_gets_a_zero_gradient_not_none() -> None:
    of = four_kinds()
    present = torch.ones(3, 4, dtype=torch.bool)
    present[:, 0] = False
    batch = random_batch(of, [1, 2], present=present)
    for engine in (Private(random_model(of), "binary", BOUND), PlainEngine(random_model(of), "binary")):
        gradient = engine.sum(batch, batch.present)
        of_cxr = {name: value for name, value in gradient.items() if "cxr" in name}
        assert len(of_cxr) > 6
        assert not any(value.any() for value in of_cxr.values())
        assert gradient["heads.labs.weight"].any()


# What is refused.


class Mixing(nn.Module):
    """A plug-in encoder with a layer that mixes patients."""

    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(width, embedding), nn.BatchNorm1d(embedding))

    def forward(self, values: Tensor) -> Tensor:
        return torch.tanh(self.stem(values))


def test_an_encoder_with_batch_statistics_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    list(ENCODERS)
    monkeypatch.setitem(ENCODERS._entries, "mixing", lambda modality, width: Mixing(modality.shape[0], width))
    spec = {"kind": "table", "encoder": "mixing", "columns": {"sodium": {"low": 1, "high": 2}}}
    of = study({"labs": spec})
    with pytest.raises(UsageError) as caught:
        Private(MultimodalModel(of, of.order), "binary", BOUND)
    assert "encoders.labs.stem.1" in str(caught.value)
    assert "BatchNorm1d" in str(caught.value)
    assert "GroupNorm" in caught.value.remedy


class Bare(nn.Module):
    """A plug-in encoder with a parameter outside any layer."""

    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.body = nn.Linear(width, embedding)
        self.scale = nn.Parameter(torch.ones(embedding))

    def forward(self, values: Tensor) -> Tensor:
        return torch.tanh(self.scale * self.body(values))


def test_a_parameter_outside_any_layer_has_the_right_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    list(ENCODERS)
    monkeypatch.setitem(ENCODERS._entries, "bare", lambda modality, width: Bare(modality.shape[0], width))
    spec = {"kind": "table", "encoder": "bare", "columns": {"sodium": {"low": 1, "high": 2}}}
    of = study({"labs": spec}, model={"embedding": 4})
    if Private is FastEngine:
        with pytest.raises(UsageError, match=r"Bare at `encoders\.labs` has no book-keeping rule.*opacus"):
            Private(random_model(of), of.task.kind, BOUND)
        return
    assert_equals_naive(of, random_batch(of, [2, 1, 3]))


def head_at_the_rounding(of: Study, records: Batch) -> MultimodalModel:
    """Parameters that a hostile server could send: a head whose huge weights cancel, but for how the sum is rounded.

    Its bias lies between two roundings of one and the same record: by the one there is no loss, by the other a full
    gradient.
    """
    worst: tuple[float, MultimodalModel] | None = None
    for seed in range(200):
        model, generator = MultimodalModel(of, of.order), torch.Generator().manual_seed(seed)
        named = dict(model.named_parameters())
        with torch.no_grad():
            for name, parameter in named.items():
                if name.startswith("encoders."):
                    parameter.zero_()
            wide = named["encoders.labs.wide.bias"]
            wide.copy_(torch.where(torch.rand(len(wide), generator=generator) < 0.5, 30.0, -30.0))
            weight = 1e9 * torch.randn(1, len(wide), generator=generator)
            weight[0, -1] = -(weight[0, :-1] * wide[:-1].sign()).double().sum() * wide[-1].sign()
            named["heads.labs.weight"].copy_(weight)
            named["heads.labs.bias"].zero_()
            logits = model(records.inputs, records.present, records.present).modality_logits[:, 0, 0]
            apart = float(logits.max() - logits.min())
            if worst is None or apart > worst[0]:
                named["heads.labs.bias"].fill_(-float(logits.min()) - 30)
                worst = (apart, model)
    assert worst is not None
    return worst[1]


@pytest.mark.parametrize("patients", [3, 7, 15, 16, 31, 32, 63, 255])
def test_how_many_patients_there_are_does_not_decide_how_others_are_rounded(patients: int) -> None:
    """One patient more changed three others' gradients from nothing to the whole bound: products round the rows that
    are left over of a block in another way, and such a server makes that decide."""
    of = study({"labs": LABS}, model={"embedding": 16, "fusion": "late", "imputer": "none"})

    def alike(count: int) -> Batch:
        batch = random_batch(of, [1] * count, seed=1)
        inputs = {name: torch.full_like(values, 0.5) for name, values in batch.inputs.items()}
        return replace(
            batch, inputs=inputs, target=torch.zeros_like(batch.target), present=torch.ones_like(batch.present)
        )

    engine = Private(head_at_the_rounding(of, alike(7)), "binary", BOUND)
    sums = [engine.sum(batch, batch.present) for batch in (alike(patients), alike(patients + 1))]
    change = length(flat(sums[1]).double() - flat(sums[0]).double())
    assert change <= engine.sensitivity * (1 + 1e-6)
