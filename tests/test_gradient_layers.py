"""The fast engine's rule of each layer type, against a loop over patients: shared use, records, masks, dtypes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from batches import CXR, LABS, NOTE, VITALS, flat, four_kinds, length, random_batch, random_model
from cohorts import study
from test_gradients import double, hide_some, naive
from torch import Tensor, nn

from gapweave.client.gradients import fast, plain_objective
from gapweave.client.gradients.fast import FastEngine
from gapweave.client.gradients.probe import PROBES, synthetic
from gapweave.shared.config.study import Study
from gapweave.shared.encoders import ENCODERS
from gapweave.shared.errors import UsageError

BOUND = 0.3


class Recurrent(nn.Module):
    def __init__(self, shape: tuple[int, ...], width: int, layer: type[nn.Module], **settings: Any) -> None:
        super().__init__()
        self.body = layer(shape[-1], 3, batch_first=True, **settings)
        self.out = nn.LazyLinear(width)
        self.out(self.body(torch.zeros(2, *shape))[0][:, -1])

    def forward(self, values: Tensor) -> Tensor:
        states, _ = self.body(values)
        return torch.tanh(self.out(states[:, -1]) + self.out(states.mean(1)))


class Attending(nn.Module):
    def __init__(self, shape: tuple[int, ...], width: int, crossed: bool = False) -> None:
        super().__init__()
        self.into = nn.Linear(shape[-1], 4)
        self.other = nn.Linear(shape[-1], 4)
        self.norm = nn.LayerNorm(4)
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.out = nn.Linear(4, width)
        self.crossed = crossed

    def forward(self, values: Tensor) -> Tensor:
        tokens = self.norm(self.into(values))
        given = self.other(values[:, :3]) if self.crossed else tokens
        mixed, _ = self.attend(tokens, given, given, need_weights=self.crossed)
        return torch.tanh(self.out((tokens + mixed).mean(1)))


class Convolving(nn.Module):
    """A convolution of 1, 2 or 3 dimensions, used twice, with its group norm."""

    def __init__(self, shape: tuple[int, ...], width: int, kind: type[nn.Module], **settings: Any) -> None:
        super().__init__()
        self.lift = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[kind]
        self.into = kind(1, 4, 3, padding=1)
        self.twice = kind(4, 4, 3, padding=1, **settings)
        self.norm = nn.GroupNorm(2, 4)
        self.out = nn.Linear(4, width)

    def forward(self, values: Tensor) -> Tensor:
        grid = values.flatten(1)[:, :16].unflatten(1, {1: (1, 16), 2: (1, 4, 4), 3: (1, 2, 2, 4)}[self.lift])
        grid = torch.tanh(self.norm(self.into(grid)))
        grid = torch.tanh(self.norm(self.twice(torch.tanh(self.twice(grid)))))
        return torch.tanh(self.out(grid.flatten(2).mean(2)))


class Tokens(nn.Module):
    """Words as tokens: an embedding whose rows repeat, with a padding token."""

    def __init__(self, shape: tuple[int, ...], width: int, padding: int | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 6, padding_idx=padding)
        self.out = nn.Linear(6, width)

    def forward(self, values: Tensor) -> Tensor:
        tokens = (values[:, :9].abs() * 7).nan_to_num().long() % 5
        return torch.tanh(self.out(self.table(tokens).mean(1) + self.table(tokens[:, :2]).sum(1)))


LAYERS: dict[str, tuple[dict[str, Any], Callable[..., nn.Module], dict[str, Any]]] = {
    "gru": (VITALS, Recurrent, {"layer": nn.GRU}),
    "gru deep, both ways": (VITALS, Recurrent, {"layer": nn.GRU, "num_layers": 2, "bidirectional": True}),
    "gru without bias": (VITALS, Recurrent, {"layer": nn.GRU, "bias": False}),
    "lstm": (VITALS, Recurrent, {"layer": nn.LSTM}),
    "lstm deep, both ways": (VITALS, Recurrent, {"layer": nn.LSTM, "num_layers": 2, "bidirectional": True}),
    "self-attention, layer norm": (VITALS, Attending, {}),
    "cross-attention": (VITALS, Attending, {"crossed": True}),
    "conv1d": (NOTE, Convolving, {"kind": nn.Conv1d}),
    "conv1d dilated": (NOTE, Convolving, {"kind": nn.Conv1d, "dilation": 2}),
    "conv2d": (CXR, Convolving, {"kind": nn.Conv2d, "stride": 1}),
    "conv2d in groups": (CXR, Convolving, {"kind": nn.Conv2d, "groups": 2}),
    "conv2d without bias": (CXR, Convolving, {"kind": nn.Conv2d, "bias": False}),
    "conv3d": (CXR, Convolving, {"kind": nn.Conv3d}),
    "embedding": (NOTE, Tokens, {}),
    "embedding with padding": (NOTE, Tokens, {"padding": 0}),
}


@pytest.fixture(params=list(LAYERS))
def of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Study:
    """A study whose first modality is read by the layer under test, beside an ordinary table."""
    spec, build, settings = LAYERS[request.param]
    list(ENCODERS)
    monkeypatch.setitem(ENCODERS._entries, "layer", lambda modality, width: build(modality.shape, width, **settings))
    return study({"first": {**spec, "encoder": "layer"}, "labs": LABS}, model={"embedding": 4, "fusion": "concat"})


@pytest.mark.parametrize("records", [(1, 1, 1, 1), (3, 1, 5, 2, 4), (1,)], ids=str)
def test_the_rule_equals_a_loop_over_patients(of: Study, records: tuple[int, ...]) -> None:
    batch = random_batch(of, records)
    used = hide_some(batch)
    exact = naive(random_model(of).double(), of, double(batch), used, BOUND)
    assert length(exact) > 0
    found = flat(FastEngine(random_model(of).double(), "binary", BOUND).sum(double(batch), used))
    assert length(found - exact) <= 1e-9 * length(exact)
    single = flat(FastEngine(random_model(of), "binary", BOUND).sum(batch, used))
    assert length(single - exact) <= 3e-6 * max(1.0, length(exact))


def test_the_model_predicts_as_before(of: Study) -> None:
    """A composite layer runs as products while the engine records, and as torch's own call otherwise."""
    batch = random_batch(of, (1, 2, 3))
    plain, model = random_model(of), random_model(of)
    engine = FastEngine(model, "binary", BOUND)
    engine.sum(batch, batch.present)
    with torch.no_grad():
        expected = plain(batch.inputs, batch.present, batch.present).logits
        torch.testing.assert_close(model(batch.inputs, batch.present, batch.present).logits, expected)


def test_nothing_of_a_step_is_kept(of: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """Believed: the graph goes with the step. True of a recurrence: its node held the tape, which held the graph."""
    tapes: list[weakref.ref[fast.Recording]] = []

    class Watched(fast.Recording):
        def __init__(self) -> None:
            super().__init__()
            tapes.append(weakref.ref(self))

    monkeypatch.setattr(fast, "Recording", Watched)
    batch = random_batch(of, (1, 2, 3))
    FastEngine(random_model(of), "binary", BOUND).sum(batch, batch.present)
    assert [tape() for tape in tapes] == [None, None], "of the probe and of the step"


def test_a_broken_patient_disturbs_nobody(of: Study) -> None:
    batch = random_batch(of, (1, 2, 1), present=torch.ones(4, 2, dtype=torch.bool))
    broken = batch.inputs["first"].clone()
    broken[1] = torch.nan
    bad = replace(batch, inputs={**batch.inputs, "first": broken})
    rest = batch.of_patients(torch.tensor([0, 2]))
    found = flat(FastEngine(random_model(of), "binary", BOUND).sum(bad, bad.present))
    expected = flat(FastEngine(random_model(of), "binary", BOUND).sum(rest, rest.present))
    if not isinstance(random_model(of).encoders["first"], Tokens):  # to tokens, NaN is a word like any other
        assert length(found - expected) <= 1e-6


class InPlace(nn.Module):
    def __init__(self, shape: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.body = nn.Linear(shape[-1], width)

    def forward(self, values: Tensor) -> Tensor:
        return self.body(values).mul_(2).tanh()


class Coupled(nn.Module):
    def __init__(self, shape: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.body = nn.Linear(shape[-1], width)

    def forward(self, values: Tensor) -> Tensor:
        return torch.tanh(self.body(values - values.mean(0)))


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (InPlace, "changed in place"),
        (Coupled, "one patient's values change another's loss"),
        (lambda shape, width: nn.Sequential(nn.Linear(shape[-1], width), nn.BatchNorm1d(width)), "BatchNorm1d at"),
        (lambda shape, width: nn.Sequential(nn.Linear(shape[-1], width), nn.PReLU()), r"PReLU at .* opacus"),
        (lambda shape, width: nn.GRU(shape[-1], width), "GRU needs batch_first"),
    ],
    ids=["in place", "coupled", "batch norm", "unknown", "time first"],
)
def test_what_cannot_be_clipped_is_refused(
    monkeypatch: pytest.MonkeyPatch, encoder: Callable[..., nn.Module], message: str
) -> None:
    list(ENCODERS)
    monkeypatch.setitem(ENCODERS._entries, "layer", lambda modality, width: encoder(modality.shape, width))
    of = study({"labs": {**LABS, "encoder": "layer"}}, model={"embedding": 4})
    batch = random_batch(of, (1, 1))
    with pytest.raises(UsageError, match=message):
        FastEngine(random_model(of), "binary", BOUND).sum(batch, batch.present)


def test_cancelling_products_are_clipped_by_what_rounding_may_leave() -> None:
    """Float32 products of 1e4 cancel over time; the true gradient is small, what is summed may not be."""
    of = study({"vitals": {**VITALS, "encoder": "series"}}, model={"embedding": 4, "imputer": "none"})
    batch = random_batch(of, (1, 1))
    huge = batch.inputs["vitals"].clone()
    huge[0] = 1e4
    huge[0, ::2] = -1e4
    bad = replace(batch, inputs={"vitals": huge})
    engine = FastEngine(random_model(of), "binary", 1.0)
    for patient in (0, 1):
        alone = bad.of_patients(torch.tensor([patient]))
        assert length(flat(engine.sum(alone, alone.present))) <= engine.sensitivity


# Parts of a batch.


@pytest.mark.parametrize("records", [(3, 1, 5, 2, 4, 1, 1), (1,) * 7], ids=str)
@pytest.mark.parametrize("share", [0.1, 0.35, 0.6])
def test_a_batch_that_does_not_fit_is_worked_on_in_parts(
    monkeypatch: pytest.MonkeyPatch, records: tuple[int, ...], share: float
) -> None:
    """To the same result, and never with more activations at a time than the limit and one patient's."""
    of = four_kinds("concat")
    batch = double(random_batch(of, records))
    used = hide_some(batch)
    engine = FastEngine(random_model(of).double(), "binary", BOUND)
    whole = flat(engine.sum(batch, used))
    a_record = engine._kept_for_backward(synthetic(engine.model, batch), plain_objective("binary")) / PROBES
    monkeypatch.setattr(fast, "ACTIVATIONS", int(share * len(batch) * a_record))
    sizes: list[int] = []
    small = FastEngine(random_model(of).double(), "binary", BOUND)
    once = small._clipped_sum
    monkeypatch.setattr(small, "_clipped_sum", lambda part, *rest: sizes.append(len(part)) or once(part, *rest))
    torch.testing.assert_close(flat(small.sum(batch, used)), whole, rtol=1e-9, atol=1e-12)
    assert sum(sizes) == len(batch)
    assert len(sizes) >= min(batch.patients, 1 / share - 1)
    assert max(sizes) <= max(1, share * len(batch)) + max(records) - 1


def test_what_a_forward_pass_keeps_grows_with_what_it_reads() -> None:
    """In bytes, more than the inputs and less than twenty times as much."""
    of = four_kinds("concat")
    engine = FastEngine(random_model(of), "binary", BOUND)
    probe = synthetic(engine.model, random_batch(of))
    inputs = sum(value.nbytes for value in probe.inputs.values())
    assert inputs < engine._kept_for_backward(probe, plain_objective("binary")) < 20 * inputs
