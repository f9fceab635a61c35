"""What the fusions with a code, an exchange, a state or a filling compute, against examples by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from batches import four_kinds, random_batch, random_model, wake

from gapweave.shared.fusion import FUSIONS, Fused, Fusion, Shape
from gapweave.shared.fusion.concat import joined
from gapweave.shared.objective import loss_terms

M, D, K = 3, 4, 2
ALL = torch.ones(1, M, dtype=torch.bool)
SOME = torch.tensor([[True, False, True]])
NO_VOTES = torch.zeros(1, M, K)


def fusion(name: str, task: str = "multiclass", **settings: Any) -> Fusion:
    entry = FUSIONS[name]
    shape = Shape(modalities=M, embedding=D, outputs=1 if task == "binary" else K, task=task)
    return wake(entry(shape, entry.Settings(**settings)))


def slots(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, M, D, generator=torch.Generator().manual_seed(seed))


def shown(values: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    return torch.where(used.unsqueeze(-1), values, 0.0)


def without_penalty(fused: Fused) -> torch.Tensor:
    assert fused.penalty is None
    return fused.logits


# Early.


def test_an_autoencoder_decides_from_the_code_and_pays_for_what_it_cannot_rebuild() -> None:
    of, values = fusion("autoencoder", code=2, strength=0.3), slots()
    fused = of(values, SOME, NO_VOTES)
    code = torch.tanh(of.encode(joined(shown(values, SOME), SOME)))
    rebuilt = of.decode(code).view(M, D)
    error = ((rebuilt[0] - values[0, 0]).square().mean() + (rebuilt[2] - values[0, 2]).square().mean()) / 2
    torch.testing.assert_close(fused.logits, of.head(code))
    torch.testing.assert_close(fused.penalty, 0.3 * error[None])


def test_what_is_to_be_rebuilt_is_detached() -> None:
    """Else embeddings shrink to what is easily rebuilt."""
    for name in ("autoencoder", "prototypes"):
        of = fusion(name)
        for parameter in of.parameters():
            parameter.data.zero_()
        values = slots().requires_grad_()
        (gradient,) = torch.autograd.grad(of(values, SOME, NO_VOTES).penalty.sum(), values)
        assert not gradient.any(), name


def test_a_denoising_autoencoder_rebuilds_what_it_does_not_see() -> None:
    of, values = fusion("denoising_autoencoder", strength=1.0), slots()
    errors = []
    for hidden in (0, 2):
        rest = SOME.clone()
        rest[0, hidden] = False
        rebuilt = of.decode(torch.tanh(of.encode(joined(shown(values, rest), rest)))).view(M, D)
        errors.append((rebuilt - values[0]).square().mean(-1)[[0, 2]].mean())
    torch.testing.assert_close(of(values, SOME, NO_VOTES).penalty, torch.stack(errors).mean()[None])


def test_a_variational_autoencoders_error_is_the_mean_over_its_draws() -> None:
    """100,000 draws of the code; the mean is off by 5 standard errors once in a million."""
    of, values = fusion("variational_autoencoder", code=3, strength=1.0, prior=0.0), slots()
    inputs = joined(shown(values, SOME), SOME)
    mean, spread = torch.tanh(of.encode(inputs)), torch.sigmoid(of.spread(inputs)).sqrt()
    codes = mean + spread * torch.randn(100_000, 3, generator=torch.Generator().manual_seed(1))
    errors = (of.decode(codes).view(-1, M, D) - values).square().mean(-1)[:, [0, 2]].mean(1).detach()
    found = of(values, SOME, NO_VOTES)
    assert abs(float(errors.mean() - found.penalty.detach())) < 5 * float(errors.std()) / math.sqrt(100_000)
    torch.testing.assert_close(found.logits, of.head(mean))


def test_a_variational_autoencoder_is_kept_near_its_prior() -> None:
    given = {"code": 3, "strength": 0.5}
    free, kept = (fusion("variational_autoencoder", prior=prior, **given) for prior in (0.0, 2.0))
    kept.load_state_dict(free.state_dict())
    inputs = joined(shown(slots(), SOME), SOME)
    mean, variance = torch.tanh(free.encode(inputs)), torch.sigmoid(free.spread(inputs))
    normal, prior = torch.distributions.Normal(mean, variance.sqrt()), torch.distributions.Normal(0.0, 1.0)
    divergence = torch.distributions.kl_divergence(normal, prior).sum(-1)
    difference = kept(slots(), SOME, NO_VOTES).penalty - free(slots(), SOME, NO_VOTES).penalty
    torch.testing.assert_close(difference, 0.5 * 2 * divergence)


# Exchange.


def test_branches_are_gated_by_all_and_count_alike() -> None:
    of, values = fusion("mmtm"), slots()
    gates = 2 * torch.sigmoid(of.gate(torch.tanh(of.squeeze(joined(shown(values, SOME), SOME))))).view(M, D)
    each = [of.branches[at]((values[0, at] * gates[at])[None]) for at in (0, 2)]
    fused = of(values, SOME, NO_VOTES)
    torch.testing.assert_close(without_penalty(fused), (each[0] + each[1]) / 2)
    assert fused.weights.tolist() == [[0.5, 0.0, 0.5]]


def test_a_modality_is_scaled_and_shifted_by_the_others() -> None:
    of, values = fusion("daft"), slots()
    changed = []
    for own, other in ((0, 2), (2, 0)):
        only = torch.zeros(1, M, D)
        only[0, other] = values[0, other]
        said = torch.tanh(of.squeeze(joined(only, SOME)))
        scale, shift = (layer(said).view(M, D)[own] for layer in (of.gate, of.shift))
        changed.append(values[0, own] * (1 + scale) + shift)
    torch.testing.assert_close(of(values, SOME, NO_VOTES).logits, of.head(torch.stack(changed).mean(0)[None]))


# A state.


def test_an_lstm_reads_what_is_there_in_order() -> None:
    """Against torch's own cell over the two modalities that are there."""
    of, values = fusion("medfuse", state=5), slots()
    cell = torch.nn.LSTMCell(D, 5)
    forget, admit, show, new = of.gates.weight.chunk(4)
    ours = torch.cat([admit, forget, new, show])  # torch's order
    forget, admit, show, new = of.gates.bias.chunk(4)
    cell.weight_ih.data, cell.weight_hh.data = ours[:, :D].clone(), ours[:, D:].clone()
    cell.bias_ih.data, cell.bias_hh.data = torch.cat([admit, forget, new, show]).detach(), torch.zeros(20)
    state = None
    for at in (0, 2):
        state = cell(of.docks.layers[at](values[0, at])[None], state)
    torch.testing.assert_close(of(values, SOME, NO_VOTES).logits, of.head(state[0]))


def test_the_forget_gates_start_open() -> None:
    shape = Shape(modalities=M, embedding=D, outputs=1, task="binary")
    assert FUSIONS["medfuse"](shape).gates.bias[:16].tolist() == [1.0] * 16


# Late.


def test_stacking_reads_votes_and_teaches_no_head() -> None:
    of = fusion("stacking", "binary")
    votes = torch.tensor([[[2.0], [50.0], [-1.0]]], requires_grad=True)
    fused = of(torch.zeros(1, M, D), SOME, votes)
    read = torch.tensor([[math.tanh(1.0), 0.0, math.tanh(-0.5), 1.0, 0.0, 1.0]])
    torch.testing.assert_close(fused.logits, (2.0 - 1.0) / 2 + of.head(read))
    assert torch.autograd.grad(fused.logits.sum(), votes, allow_unused=True) == (None,)


# Fillings.


def test_shared_features_stand_in_for_what_is_missing() -> None:
    of, values = fusion("shaspec", alignment=0.2, domain=0.3), slots()
    fused = of(values, SOME, NO_VOTES)
    shared = {at: torch.tanh(of.shared(values[0, at])) for at in (0, 2)}
    own = {at: torch.tanh(of.specific.layers[at](values[0, at])) for at in (0, 2)}
    mean = (shared[0] + shared[2]) / 2
    filled = torch.stack([shared[0] + own[0], mean, shared[2] + own[2]])[None]
    torch.testing.assert_close(fused.logits, of.head(joined(filled, SOME)))
    apart = sum((shared[at] - mean).square().mean() for at in (0, 2)) / 2
    told = sum(torch.log_softmax(of.domain(own[at]), -1)[at] for at in (0, 2)) / 2
    torch.testing.assert_close(fused.penalty[0], 0.2 * apart - 0.3 * told)


def test_what_is_missing_is_that_of_the_typical_records_which_one_resembles() -> None:
    of, values = fusion("prototypes", prototypes=2, strength=0.3), slots()
    typical = of.typical.table.weight.view(2, M, D)
    alike = torch.stack([sum(row[at] @ values[0, at] for at in (0, 2)) / 2 / math.sqrt(D) for row in typical])
    guess = (torch.softmax(alike, 0)[:, None, None] * torch.tanh(typical)).sum(0)
    fused = of(values, SOME, NO_VOTES)
    filled = torch.stack([values[0, 0], guess[1], values[0, 2]])[None]
    torch.testing.assert_close(fused.logits, of.head(joined(filled, SOME)))
    error = sum((guess[at] - values[0, at]).square().mean() for at in (0, 2)) / 2
    torch.testing.assert_close(fused.penalty[0], 0.3 * error)


def test_the_bank_fills_by_what_is_there_and_the_pattern_chooses_experts() -> None:
    of, values = fusion("flex_moe", experts=2, width=3), slots()
    bank = of.bank.weight.t().view(M, M, D)
    filled = values.clone()
    filled[0, 1] = (bank[0, 1] + bank[2, 1]) / 2
    inputs = joined(filled, SOME)
    shares = torch.softmax(of.router(inputs) + of.pattern.weight[:, 0] + of.pattern.weight[:, 2], -1)[0]
    said = torch.tanh(of.experts(inputs)).view(2, 3)
    torch.testing.assert_close(without_penalty(of(values, SOME, NO_VOTES)), of.head((shares @ said)[None]))


def test_one_layer_has_weights_of_its_own_for_every_modality() -> None:
    of, values = fusion("hypermm", rank=2), slots()
    read = []
    for at in (0, 2):
        scale, shift = of.hyper(of.token.table.weight[at]).split((2, D))
        weights = of.whole.weight + of.up.weight @ torch.diag(scale) @ of.down.weight
        read.append(torch.tanh(weights @ values[0, at] + of.whole.bias + shift))
    torch.testing.assert_close(without_penalty(of(values, SOME, NO_VOTES)), of.head((read[0] + read[1])[None]))


# Penalties.


@pytest.mark.parametrize("name", ["autoencoder", "shaspec", "variational_autoencoder"])
def test_a_fusions_penalty_is_part_of_the_loss_and_not_of_the_prediction(name: str) -> None:
    model, batch = random_model(four_kinds(name, "none")), random_batch(four_kinds(name, "none"))
    outputs = model(batch.inputs, batch.present, batch.present)
    terms = loss_terms(outputs, batch.target, batch.label_mask, "binary")
    assert outputs.penalty.shape == (6,)
    torch.testing.assert_close(terms.rest, outputs.penalty)
    for one, other in itertools.combinations(range(6), 2):
        assert outputs.penalty[one] != outputs.penalty[other], "it is of the record"
