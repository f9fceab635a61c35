"""What each fusion computes, against examples by hand and properties of its own."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import EVERY_KIND, TASKS, four_kinds, wake
from cohorts import study

from gapweave.shared import catalogue
from gapweave.shared.errors import UsageError
from gapweave.shared.fusion import FUSIONS, Fusion, Shape, chosen_fusion
from gapweave.shared.fusion.dwfuse import class_weights
from gapweave.shared.model import Outputs
from gapweave.shared.objective import record_losses
from gapweave.sites.study_check import check_names

M, D, K = 3, 4, 2
ALL = torch.ones(1, M, dtype=torch.bool)
NO_SLOTS = torch.zeros(1, M, D)


def fusion(name: str, task: str = "multiclass", **settings: Any) -> Fusion:
    entry = FUSIONS[name]
    shape = Shape(modalities=M, embedding=D, outputs=1 if task == "binary" else K, task=task)
    return entry(shape, entry.Settings(**settings))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def votes(*rows: list[float]) -> torch.Tensor:
    return torch.tensor([rows])


def used(*flags: bool) -> torch.Tensor:
    return torch.tensor([flags])


# Late.


def test_late_is_the_mean_of_the_votes_that_are_there() -> None:
    fused = fusion("late")(NO_SLOTS, used(True, False, True), votes([1.0, 4.0], [9.0, 9.0], [3.0, 0.0]))
    assert fused.logits.tolist() == [[2.0, 2.0]]
    assert fused.weights.tolist() == [[0.5, 0.0, 0.5]]


def test_weighted_votes_count_by_their_learned_scores() -> None:
    weighted = fusion("weighted")
    weighted.scores.table.weight.data = torch.tensor([[math.log(3.0)], [0.0], [7.0]])
    fused = weighted(NO_SLOTS, used(True, True, False), votes([1.0, 4.0], [5.0, 0.0], [9.0, 9.0]))
    torch.testing.assert_close(fused.weights, torch.tensor([[0.75, 0.25, 0.0]]))
    torch.testing.assert_close(fused.logits, torch.tensor([[2.0, 3.0]]))


def test_qmf_trusts_the_modality_that_is_surer_whatever_it_is_sure_of() -> None:
    for task in ("binary", "multiclass"):
        sure, unsure = ([-4.0], [1.0]) if task == "binary" else ([4.0, -4.0], [-0.5, 0.5])
        weights = fusion("qmf", task)(NO_SLOTS, ALL, votes(sure, unsure, unsure)).weights[0]
        assert weights[0] > weights[1] == weights[2]
        mirrored = fusion("qmf", task)(NO_SLOTS, ALL, -votes(sure, unsure, unsure)).weights[0]
        torch.testing.assert_close(mirrored, weights)


def test_qmf_by_hand() -> None:
    energy = [math.log(math.exp(a) + math.exp(-a)) for a in (2.0, 0.5)]
    trust = [math.log1p(math.exp(value)) for value in energy]
    fused = fusion("qmf", "binary")(NO_SLOTS, used(True, True, False), votes([4.0], [-1.0], [50.0]))
    expected = [trust[0] / sum(trust), trust[1] / sum(trust)]
    assert fused.weights[0].tolist() == pytest.approx([*expected, 0.0])
    assert fused.logits.item() == pytest.approx(4 * expected[0] - expected[1])


@pytest.mark.parametrize(
    ("task", "given", "expected"),
    [
        ("binary", [[3.0], [0.1], [-9.0]], [math.log(3 / 2)]),
        ("multilabel", [[3.0, -1.0], [0.1, -1.0], [-9.0, -1.0]], [math.log(3 / 2), -math.log(4)]),
        ("multiclass", [[3.0, 2.0], [0.1, 0.0], [-9.0, -1.0]], [math.log(3), math.log(2)]),
    ],
)
def test_majority_counts_votes_and_not_how_sure_they_are(
    task: str, given: list[list[float]], expected: list[float]
) -> None:
    assert fusion("majority", task)(NO_SLOTS, ALL, votes(*given)).logits[0].tolist() == pytest.approx(expected)


# Dynamic weights.


def test_dwfuse_by_hand() -> None:
    """Two modalities with p = .8 and .5 for class 1, a joint head that says .5: weights, score and shares."""
    of = fusion("dwfuse", "binary")
    for parameter in of.parameters():
        parameter.data.zero_()
    logit = math.log(0.8 / 0.2)
    fused = of(NO_SLOTS, used(True, True, False), votes([logit], [0.0], [99.0]))
    # (no, yes) of each: what the other one does not see.
    torch.testing.assert_close(fused.vote_weights, torch.tensor([[[0.5, 0.5], [0.8, 0.2], [0.0, 0.0]]]))
    no = (math.log(0.5) + 0.5 * math.log(0.2) + 0.8 * math.log(0.5)) / 3
    yes = (math.log(0.5) + 0.5 * math.log(0.8) + 0.2 * math.log(0.5)) / 3
    assert fused.logits.item() == pytest.approx(yes - no, rel=1e-5)
    assert fused.weights[0].tolist() == pytest.approx([0.5 / 0.7, 0.2 / 0.7, 0.0])
    assert fused.joint.item() == 0.0


def test_dwfuse_over_three_modalities_and_alone() -> None:
    p = torch.tensor([[[0.2, 0.8], [0.5, 0.5], [0.9, 0.1]]])
    weights = class_weights(p, ALL, beta=1.0)
    torch.testing.assert_close(weights[0, 0], torch.tensor([(0.5 * 0.1) ** 0.5, (0.5 * 0.9) ** 0.5]))
    torch.testing.assert_close(class_weights(p, ALL, beta=0.5), weights.sqrt())
    assert torch.equal(class_weights(p, ALL, beta=0.0), torch.ones_like(p))
    assert class_weights(p, used(False, True, False), beta=1.0)[0, 1].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("task", list(TASKS))
@pytest.mark.parametrize("p", [0.2, 0.5, 0.8])
def test_dwfuse_pulls_every_vote_towards_the_truth(task: str, p: float) -> None:
    # Believed (the paper's Eqs. 12 and 13): the loss falls when the weighted votes do. True: their sign maximises it.
    logit = math.log(p / (1 - p))
    says = torch.full((1, M, 1 if task == "binary" else K), logit if task != "multiclass" else 0.0)
    if task == "multiclass":
        says[..., 0] = logit
    says.requires_grad_()
    mask, truth = used(True, True, False), torch.zeros(1, says.shape[-1])
    truth[:, 0] = 1
    fused = fusion("dwfuse", task)(NO_SLOTS, mask, says)
    outputs = Outputs(
        logits=fused.logits, modality_logits=says, embeddings=NO_SLOTS, imputed=NO_SLOTS, present=mask, used=mask,
        weights=fused.weights, joint=fused.joint, vote_weights=fused.vote_weights,
    )  # fmt: skip
    loss = record_losses(outputs, truth, torch.ones_like(truth, dtype=torch.bool), task).sum()
    (gradient,) = torch.autograd.grad(loss, says)
    labels = 1 if task != "multilabel" else K
    # The mean over two modalities of w (p - 1), w = 1 - p of the other one.
    torch.testing.assert_close(gradient[0, :2, 0], torch.full((2,), -((1 - p) ** 2) / 2 / labels))
    if task != "binary":
        assert (gradient[0, :2, 1] > 0).all()
    assert not gradient[0, 2].any()


# Pooling.


def pool(name: str, mask: torch.Tensor) -> tuple[list[float], Any]:
    """The pooled vector of docked embeddings 1, -2, 3 (first component) and 0, 1, -1 (second)."""
    docked = torch.tensor([[[1.0, 0.0], [-2.0, 1.0], [3.0, -1.0]]])
    pooled, weights = fusion(name).pool(torch.where(mask.unsqueeze(-1), docked, 0.0), mask)
    return pooled[0].tolist(), None if weights is None else weights[0].tolist()


def test_pooling_by_hand() -> None:
    assert pool("sum", used(True, True, False)) == ([-1.0, 1.0], None)
    assert pool("mean", used(True, True, False)) == ([-0.5, 0.5], [0.5, 0.5, 0.0])
    assert pool("max", used(True, True, False)) == ([1.0, 1.0], [0.5, 0.5, 0.0])
    # The absent modality's 0 is larger than -2, and does not count.
    assert pool("max", used(False, True, False)) == ([-2.0, 1.0], [0.0, 1.0, 0.0])
    pooled, _ = pool("product", used(True, True, False))
    assert pooled == pytest.approx([(1 + math.tanh(1)) * (1 + math.tanh(-2)), 1 + math.tanh(1)])


def test_equal_largest_components_share_one() -> None:
    docked = torch.tensor([[[2.0], [2.0], [1.0]]])
    assert fusion("max").pool(docked, ALL)[1][0].tolist() == [0.5, 0.5, 0.0]


def test_embracenet_is_the_mean_of_its_draws() -> None:
    """20,000 draws of the paper's kind; a component's mean is off by 5 standard errors once in a million."""
    embrace = wake(fusion("embracenet"))
    embrace.head = torch.nn.Identity()
    slots, mask = noise(1, M, D), used(True, False, True)
    fused = embrace(slots, mask, torch.zeros(1, M, K))
    docked = torch.relu(embrace.docks(slots, mask))[0]
    draws = torch.multinomial(fused.weights.expand(D, -1), 20_000, True, generator=torch.Generator().manual_seed(1))
    drawn = docked.gather(0, draws.t())
    error = 5 * drawn.std(0) / math.sqrt(20_000) + 1e-6
    assert ((drawn.mean(0) - fused.logits[0]).abs() <= error).all()


# Attention and gates.


@pytest.mark.parametrize("name", ["attention", "cross_attention", "gated"])
def test_the_record_decides_its_own_weights(name: str) -> None:
    """They differ between records with the same modalities, and of one modality it has the whole weight."""
    of = wake(fusion(name))
    weights = of(noise(2, M, D), ALL.expand(2, -1), torch.zeros(2, M, K)).weights
    assert (weights[0] - weights[1]).abs().max() > 1e-3
    alone = of(noise(1, M, D), used(False, True, False), torch.zeros(1, M, K)).weights
    torch.testing.assert_close(alone, torch.tensor([[0.0, 1.0, 0.0]]))


def test_attention_weights_by_hand() -> None:
    of = wake(fusion("attention"))
    slots, mask = noise(1, M, D), used(True, True, False)
    tokens = [of.docks.layers[at](slots[0, at]) for at in range(2)]
    scores = torch.stack([of.query(torch.tanh(of.key(token)))[0] for token in tokens])
    weights = torch.softmax(scores, 0)
    fused = of(slots, mask, torch.zeros(1, M, K))
    torch.testing.assert_close(fused.weights[0, :2], weights)
    torch.testing.assert_close(fused.logits[0], of.head((weights[0] * tokens[0] + weights[1] * tokens[1])[None])[0])


def test_a_closed_gate_lets_nothing_of_a_slot_through() -> None:
    of = wake(fusion("se_gate"))
    slots, other = noise(1, M, D), noise(1, M, D, seed=1)
    of.excite.weight.data.zero_()
    of.excite.bias.data.fill_(0.0)
    none = torch.zeros(1, M, K)
    opened = of.head(torch.cat([slots.flatten(1), torch.ones(1, M)], 1))
    torch.testing.assert_close(of(slots, ALL, none).logits, opened)
    of.excite.bias.data[:D] = -1e3
    mixed = torch.cat([other[:, :1], slots[:, 1:]], 1)
    assert torch.equal(of(mixed, ALL, none).logits, of(slots, ALL, none).logits)


# Tensors.


def test_the_tensor_holds_all_products_of_what_is_there() -> None:
    of = wake(fusion("tensor", width=2))
    slots, mask = noise(1, M, D), used(True, False, True)
    first, third = ([1.0, *torch.tanh(of.docks.layers[at](slots[0, at])).tolist()] for at in (0, 2))
    outer = [a * b * c for a, b, c in product(first, [1.0, 0.0, 0.0], third)]
    expected = of.out(torch.tensor([outer]))
    torch.testing.assert_close(of(slots, mask, torch.zeros(1, M, K)).logits, expected)


def test_the_low_rank_tensor_is_a_tensor_of_low_rank() -> None:
    """Its products are the outer product of [1, v] of each modality against a sum of rank-one tensors."""
    of = wake(fusion("low_rank_tensor", rank=2, width=1))
    of.head = torch.nn.Identity()
    slots = noise(1, M, D)
    extended = [torch.cat([slots[0, at], torch.ones(1)]) for at in range(M)]
    factors = [torch.cat([layer.weight, layer.bias[:, None]], 1) for layer in of.docks.layers]
    whole = torch.einsum("ra,rb,rc->abc", *factors) / 2
    expected = torch.einsum("abc,a,b,c->", whole, *extended)
    torch.testing.assert_close(of(slots, ALL, torch.zeros(1, M, K)).logits[0, 0], expected)


def many(modalities: int, **model: Any) -> Any:
    return study({f"m{at}": EVERY_KIND["labs"] for at in range(modalities)}, model=model)


def test_a_tensor_over_too_many_modalities_is_refused_with_its_size() -> None:
    assert chosen_fusion(many(5, fusion="tensor"))
    with pytest.raises(UsageError, match=r"6 modalities of width=4 has 5\^6 = 15,625 numbers, at most 4,096") as caught:
        check_names(many(6, fusion="tensor"))
    assert "low_rank_tensor" in caught.value.remedy
    assert caught.value.where == "study:model.fusion"
    check_names(many(6, fusion="tensor", fusion_settings={"width": 3}))
    check_names(many(40, fusion="low_rank_tensor"))


# The catalogue.


def test_the_page_of_methods_is_current() -> None:
    docs = Path(__file__).parent.parent / "docs"
    page = catalogue.markdown(catalogue.read_measured(docs))
    assert (docs / "methods.md").read_text(encoding="utf-8").strip() == page.strip(), "run make docs"


def test_a_part_without_a_section_is_named() -> None:
    def part() -> None:
        """Something.

        Reference: a paper
        Form: two
          lines
        """

    with pytest.raises(UsageError, match="docstring of part has no section 'Couples'"):
        catalogue.described(part)
    part.__doc__ = "Something.\n\nReference: a paper\nForm: two\n    lines\nCouples: nothing\n"
    assert catalogue.described(part) == {
        "Summary": "Something.", "Reference": "a paper", "Form": "two lines", "Couples": "nothing",
    }  # fmt: skip


# Refusals and settings.


def test_an_unknown_fusion_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'attention'"):
        check_names(four_kinds("atention"))


def test_a_fusion_that_cannot_do_several_labels_is_refused_before_any_work() -> None:
    with pytest.raises(UsageError, match="multilabel") as caught:
        check_names(four_kinds("qmf", task="multilabel"))
    assert "weighted" in caught.value.remedy


@pytest.mark.parametrize(
    ("name", "settings", "text"),
    [
        ("gated", {"hiden": 3}, "did you mean 'hidden'"),
        ("late", {"hidden": 3}, "unknown key 'hidden'"),
        ("tensor", {"width": 0}, "greater than or equal to 1"),
        ("low_rank_tensor", {"rank": "many"}, "found 'many'"),
    ],
)
def test_settings_that_a_fusion_does_not_have_are_refused(name: str, settings: dict[str, Any], text: str) -> None:
    of = study(EVERY_KIND, model={"fusion": name, "fusion_settings": settings})
    with pytest.raises(UsageError, match=text) as caught:
        check_names(of)
    assert caught.value.where.startswith("study:model.fusion_settings")


def test_settings_change_the_model() -> None:
    of = study(EVERY_KIND, model={"fusion": "concat", "fusion_settings": {"hidden": 5}})
    entry, shape, settings = chosen_fusion(of)
    assert entry(shape, settings).head.hidden.out_features == 5
    assert entry(shape).head.hidden.out_features == 24
