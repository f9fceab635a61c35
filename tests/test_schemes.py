"""What each training scheme computes, against examples by hand and properties of its own."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import EVERY_KIND, flat, four_kinds, random_batch, random_model
from cohorts import study
from commandline import OPEN, QUICK, done, hospitals, rounds_of

from gapweave.client.gradients.plain import PlainEngine
from gapweave.shared.config.study import Study, load_study
from gapweave.shared.errors import UsageError
from gapweave.shared.model import MultimodalModel
from gapweave.shared.objective import loss_terms, probabilities, record_losses
from gapweave.shared.schema import Batch
from gapweave.shared.schemes import Lesson, Moment, Scheme, build_scheme
from gapweave.shared.schemes.distill import divergence
from gapweave.shared.schemes.ogm_ge import modulation
from gapweave.shared.schemes.pmr import prototypes
from gapweave.sites.study_check import check_names

LAST = Moment(10, 10)


def scene(
    name: str, fusion: str = "concat", task: str = "binary", **settings: Any
) -> tuple[Study, Scheme, MultimodalModel, Batch]:
    """A scheme, a model, and six records that have all four modalities."""
    of = four_kinds(fusion, "none", task, scheme={"name": name, "settings": settings})
    batch = random_batch(of, present=torch.ones(6, 4, dtype=torch.bool))
    return of, build_scheme(of), random_model(of), batch


def plain(model: MultimodalModel, batch: Batch, used: torch.Tensor, kind: str = "binary") -> torch.Tensor:
    return record_losses(model(batch.inputs, batch.present, used), batch.target, batch.label_mask, kind)


def surprise(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """-log p of the truth, [R], of binary logits [R, 1]."""
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, batch.target, reduction="none")[:, 0]


# Which modalities are used.


def test_modalities_are_alone_first_and_together_later() -> None:
    _, scheme, _, batch = scene("unimodal_first", share=0.3)
    draws = torch.rand(6, 5, generator=torch.Generator().manual_seed(0))
    for number in range(1, 11):
        used = scheme.used(batch.present, draws, Moment(number, 10))
        assert used.sum(1).tolist() == [1 if number <= 3 else 4] * 6
    alone = scheme.used(torch.ones(4000, 4, dtype=torch.bool), torch.rand(4000, 5), Moment(1, 10)).float().mean(0)
    # Each modality a quarter of the time; 5 standard errors.
    assert ((alone - 0.25).abs() < 5 * math.sqrt(0.25 * 0.75 / 4000)).all()


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_share_of_records_with_hidden_modalities_is_the_studys(share: float) -> None:
    _, scheme, _, _ = scene("modality_dropout", hide=share)
    present = torch.ones(20_000, 4, dtype=torch.bool)
    used = scheme.used(present, torch.rand(20_000, 5, generator=torch.Generator().manual_seed(0)), LAST)
    # A random subset is the whole one time in 16; 5 standard errors.
    hidden, expected = float((~used).any(1).double().mean()), share * 15 / 16
    assert abs(hidden - expected) <= 5 * math.sqrt(expected * (1 - expected) / 20_000)


# How the loss is made.


def test_blended_losses_by_hand() -> None:
    _, scheme, model, batch = scene("g_blend", joint=0.5, votes={"labs": 3.0, "note": 0.0})
    outputs = model(batch.inputs, batch.present, batch.present)
    terms = loss_terms(outputs, batch.target, batch.label_mask, "binary")
    weights = torch.tensor([1.0, 3.0, 0.0, 1.0])  # cxr, labs, note, vitals
    expected = 0.5 * terms.joint + (weights * terms.votes).sum(1) / 4
    torch.testing.assert_close(scheme.losses(model, batch, batch.present, LAST), expected)


@pytest.mark.parametrize("task", ["binary", "multiclass"])
def test_a_vote_counts_less_where_the_others_see_the_truth_by_hand(task: str) -> None:
    _, scheme, model, batch = scene("dwfuse", "late", task, beta=0.5)
    outputs = model(batch.inputs, batch.present, batch.present)
    terms = loss_terms(outputs, batch.target, batch.label_mask, scheme.kind)
    doubts = 1 - torch.exp(-terms.votes.detach())  # of the truth, by each modality
    weights = (doubts.prod(1, keepdim=True) / doubts) ** (0.5 / 3)
    expected = terms.joint + (weights * terms.votes).mean(1)
    torch.testing.assert_close(scheme.losses(model, batch, batch.present, LAST), expected, rtol=1e-4, atol=1e-5)
    single = torch.tensor([True, False, False, False]).expand(6, -1)
    alone = scheme.losses(model, batch, single, LAST)
    torch.testing.assert_close(alone, plain(model, batch, single, task))


@pytest.mark.parametrize("task", ["binary", "multilabel"])
def test_the_scheme_dwfuse_trains_votes_as_the_fusion_of_that_name_does(task: str) -> None:
    _, scheme, model, batch = scene("dwfuse", "dwfuse", task)
    outputs = model(batch.inputs, batch.present, batch.present)
    votes = model.votes(outputs.embeddings, model.ready(batch.inputs, batch.present))
    terms = loss_terms(outputs, batch.target, batch.label_mask, scheme.kind)
    lesson = Lesson(
        model=model,
        batch=batch,
        kind=scheme.kind,
        at=LAST,
        embeddings=outputs.embeddings,
        votes=votes,
        outputs=replace(outputs, vote_weights=None),
        terms=terms,
    )
    torch.testing.assert_close(scheme.total(lesson), terms.joint + terms.votes.mean(1))


def test_modulation_by_hand() -> None:
    sure = torch.tensor([[0.8, 0.4, 0.9], [0.2, 0.6, 0.7], [0.9, 0.1, 0.1]])
    used = torch.tensor([[True, True, False], [True, True, True], [True, False, False]])
    factors = modulation(sure, used, 0.5)
    expected = [
        [1 - math.tanh(0.5 * 2), 1, 1],
        [1, 1 - math.tanh(0.5 * 0.6 / 0.45), 1 - math.tanh(0.5 * 0.7 / 0.4)],
        [1, 1, 1],
    ]
    torch.testing.assert_close(factors, torch.tensor(expected))
    assert torch.equal(modulation(sure, used, 0.0), torch.ones(3, 3))


def test_the_surer_modality_learns_less_and_the_loss_stays() -> None:
    of, scheme, model, batch = scene("ogm_ge")
    one = batch.rows(torch.tensor([0]))
    torch.testing.assert_close(scheme.losses(model, one, one.present, LAST), plain(model, one, one.present))
    engine = PlainEngine(model, "binary")
    before = engine.sum(one, one.present)
    after = engine.sum(one, one.present, lambda *given: scheme.losses(*given, LAST))
    votes = model(one.inputs, one.present, one.present).modality_logits
    sure = torch.exp(-torch.stack([surprise(votes[:, at], one) for at in range(4)], 1))
    factors = modulation(sure, one.present, 0.5)[0]
    assert factors.min() < 1 == factors.max(), "some are slowed down, some are not"
    for name, value in before.items():
        group, _, modality = name.partition(".")
        factor = factors[of.order.index(modality.partition(".")[0])] if group == "encoders" else 1.0
        torch.testing.assert_close(after[name], factor * value, msg=name)


@pytest.mark.parametrize("outputs", [1, 3])
def test_prototypes_are_orthogonal_unit_vectors_of_the_study(outputs: int) -> None:
    found = prototypes(0, outputs, 16)
    torch.testing.assert_close(found.t() @ found, torch.eye(outputs))
    assert torch.equal(found, prototypes(0, outputs, 16))
    assert not torch.equal(found, prototypes(1, outputs, 16))
    assert prototypes(0, 5, 2).norm(dim=0).tolist() == pytest.approx([1] * 5)


@pytest.mark.parametrize("task", ["binary", "multiclass"])
def test_weaker_modalities_are_drawn_to_their_prototype_by_hand(task: str) -> None:
    of, scheme, model, batch = scene("pmr", "concat", task, alpha=0.7)
    embeddings = model.embed(model.ready(batch.inputs, batch.present), batch.present).detach()
    points = prototypes(of.seed, of.task.outputs, 4).t()
    points = torch.cat([-points, points]) if task == "binary" else points
    distances = (embeddings.unsqueeze(2) - points).square().sum(-1)
    truth = batch.target[:, 0].long() if task == "binary" else batch.target.argmax(1)
    losses = -torch.log_softmax(-distances, -1)[torch.arange(6), :, truth]
    sure = torch.exp(-losses)
    others = (sure.sum(1, keepdim=True) - sure) / 3
    drawn = ((others / sure - 1).clamp(0, 1) * losses).mean(1)
    assert drawn.min() > 0
    expected = plain(model, batch, batch.present, task) + 0.7 * drawn
    torch.testing.assert_close(scheme.losses(model, batch, batch.present, LAST), expected, rtol=1e-4, atol=1e-5)
    single = torch.tensor([True, False, False, False]).expand(6, -1)
    alone = scheme.losses(model, batch, single, LAST)
    torch.testing.assert_close(alone, plain(model, batch, single, task))


def test_divergence_by_hand() -> None:
    taught, said = torch.tensor([[math.log(3)]]), torch.tensor([[0.0]])
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert divergence(taught, said, "binary").item() == pytest.approx(expected, rel=1e-5)
    taught, said = torch.tensor([[math.log(2), 0.0, 0.0]]), torch.zeros(1, 3)
    expected = 0.5 * math.log(1.5) + 0.5 * math.log(0.75)
    assert divergence(taught, said, "multiclass").item() == pytest.approx(expected, rel=1e-5)


def test_a_part_learns_from_the_whole_and_the_whole_from_nobody() -> None:
    _, scheme, model, batch = scene("distill", strength=0.5, temperature=2.0)
    torch.testing.assert_close(scheme.losses(model, batch, batch.present, LAST), plain(model, batch, batch.present))
    used = batch.present.clone()
    used[:, 1:] = False
    whole = model(batch.inputs, batch.present, batch.present).logits.detach()
    part = model(batch.inputs, batch.present, used).logits
    away = divergence(whole / 2, part / 2, "binary")
    expected = plain(model, batch, used) + 0.5 * 4 * away
    found = scheme.losses(model, batch, used, LAST)
    torch.testing.assert_close(found, expected)
    parameters = [value for value in model.parameters() if value.requires_grad]
    ours, theirs = (
        torch.autograd.grad(loss.sum(), parameters, retain_graph=True, allow_unused=True) for loss in (found, expected)
    )
    for one, other in zip(ours, theirs, strict=True):
        zero = torch.zeros(())
        torch.testing.assert_close(
            zero if one is None else one, (zero if one is None else torch.zeros_like(one)) if other is None else other
        )


def test_contributions_are_what_leaving_a_modality_out_costs() -> None:
    """Late fusion of two modalities: what remains without one is the other's vote and the intercept."""
    of = study({name: EVERY_KIND[name] for name in ("labs", "note")}, model={"embedding": 4, "imputer": "none"},
               scheme={"name": "attribution", "settings": {"strength": 2.0}})  # fmt: skip
    scheme, model = build_scheme(of), random_model(of)
    batch = random_batch(of, present=torch.ones(6, 2, dtype=torch.bool))
    outputs = model(batch.inputs, batch.present, batch.present)
    intercept = model.fusion.intercept.weight[0]
    costs = [
        surprise(outputs.modality_logits[:, other] + intercept, batch) - surprise(outputs.logits, batch)
        for other in (1, 0)
    ]
    variance = ((costs[0] - costs[1]) / 2).square()
    expected = plain(model, batch, batch.present) + 2 * variance
    torch.testing.assert_close(scheme.losses(model, batch, batch.present, LAST), expected)
    single = torch.tensor([True, False]).expand(6, -1)
    torch.testing.assert_close(scheme.losses(model, batch, single, LAST), plain(model, batch, single))


def test_a_difficult_record_counts_less_at_first_and_fully_later() -> None:
    _, scheme, model, batch = scene("curriculum", start=0.2, share=0.5)
    assert [scheme.allowed(Moment(number, 10)) for number in (1, 4, 5, 10)] == pytest.approx([0.36, 0.84, 1.0, 1.0])
    outputs = model(batch.inputs, batch.present, batch.present)
    alone = torch.exp(-torch.stack([surprise(outputs.modality_logits[:, at], batch) for at in range(4)], 1)).mean(1)
    difficulty = 1 - (alone + torch.exp(-surprise(outputs.logits, batch))) / 2
    losses = plain(model, batch, batch.present).detach()
    expected = (0.36 / difficulty.detach()).clamp(max=1) * losses
    assert (expected < losses).any(), "some record is too difficult"
    torch.testing.assert_close(scheme.losses(model, batch, batch.present, Moment(1, 10)), expected)
    torch.testing.assert_close(scheme.losses(model, batch, batch.present, LAST), losses)
    one = batch.rows(torch.tensor([int((expected / losses).argmin())]))
    engine = PlainEngine(model, "binary")
    before = flat(engine.sum(one, one.present))
    after = flat(engine.sum(one, one.present, lambda *given: scheme.losses(*given, Moment(1, 10))))
    torch.testing.assert_close(after, float((expected / losses).min()) * before, rtol=1e-4, atol=1e-7)


# Laziness.


def lazy_study(modalities: int, **keys: Any) -> Study:
    kinds = {f"m{at}": EVERY_KIND["labs"] for at in range(modalities)}
    return study(kinds, model={"embedding": 4, "imputer": "none"}, scheme={"name": "tla"}, **keys)


@pytest.mark.parametrize(("modalities", "combinations"), [(1, 0), (2, 2), (3, 6), (4, 14), (5, 15), (6, 21)])
def test_every_combination_has_its_turn(modalities: int, combinations: int) -> None:
    """All proper parts of up to four modalities, those of one and two of more; each once before one comes again."""
    scheme = build_scheme(lazy_study(modalities))
    rounds = range(1, 3 * max(1, combinations) + 1)
    seen = Counter(scheme.lazy(Moment(number, len(rounds))) for number in rounds)
    if modalities == 1:
        assert seen == {(): 3}
        assert scheme.choices(Moment(1, 3)) == {}
        return
    assert len(seen) == combinations
    assert set(seen.values()) == {3}
    assert all(0 < len(chosen) < modalities for chosen in seen)
    first = [scheme.lazy(Moment(number, 9)) for number in range(1, combinations + 1)]
    assert len(set(first)) == combinations


def test_the_order_of_the_combinations_is_public_and_the_seeds() -> None:
    def order(seed: int) -> list[str]:
        scheme = build_scheme(lazy_study(4, seed=seed))
        return [scheme.choices(Moment(number, 14))["lazy"] for number in range(1, 15)]

    assert order(0) == order(0) != order(1)
    assert "m0+m2" in order(0)


def test_who_has_the_combination_is_trained_on_it_by_hand() -> None:
    of, scheme, model, batch = scene("tla", strength=0.4)
    at = Moment(3, 14)
    lazy = list(scheme.lazy(at))
    assert scheme.choices(at) == {"lazy": "+".join(of.order[position] for position in lazy)}
    present = batch.present.clone()
    present[3:, lazy[0]] = False
    batch = random_batch(of, present=present)
    part = torch.zeros_like(present)
    part[:3, lazy] = True
    expected = plain(model, batch, present)
    expected[:3] += 0.4 * surprise(model(batch.inputs, present, part).logits, batch)[:3]
    torch.testing.assert_close(scheme.losses(model, batch, present, at), expected)


def test_a_run_says_which_combination_had_its_turn(tmp_path: Path) -> None:
    """In rounds.jsonl and in the report, private or not; other schemes say nothing."""
    file = hospitals(tmp_path / "demo", patients=40)
    run = tmp_path / "run"
    done("simulate", file, "--out", run, *QUICK, "--rounds", "3", "--set", "method=omnifuse", "--set", "epsilon=3")
    of = load_study(run / "study.yaml")
    scheme = build_scheme(of)
    lines = rounds_of(run)
    assert [line["lazy"] for line in lines] == [scheme.choices(Moment(number, 3))["lazy"] for number in (1, 2, 3)]
    page = (run / "report.html").read_text(encoding="utf-8")
    for line in lines:
        assert f'<th scope="row">{line["lazy"]}</th><td>{line["round"]}</td>' in page
    done("simulate", file, "--out", tmp_path / "plain", *QUICK, *OPEN)
    assert not any("lazy" in line for line in rounds_of(tmp_path / "plain"))
    assert "Laziness" not in (tmp_path / "plain" / "report.html").read_text(encoding="utf-8")


# Refusals.


@pytest.mark.parametrize(
    ("scheme", "text"),
    [
        ({"name": "tlaa"}, "no scheme is called 'tlaa'"),
        ({"name": "tla", "settings": {"strenght": 1}}, "did you mean 'strength'"),
        ({"name": "none", "settings": {"hide": 1.5}}, "less than or equal to 1"),
        ({"name": "g_blend", "settings": {"votes": {"lab": 1}}}, "did you mean 'labs'"),
        ({"name": "g_blend", "settings": {"votes": {"labs": -1}}}, "labs=-1 is not from 0 to 100"),
    ],
)
def test_a_scheme_that_does_not_fit_is_refused_before_any_work(scheme: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text) as caught:
        check_names(study(EVERY_KIND, scheme=scheme))
    assert caught.value.where.startswith("study:scheme")
    assert caught.value.remedy


def test_probabilities_of_a_model_know_nothing_of_the_scheme() -> None:
    """Two schemes, one model: prediction is the same."""
    (_, _, one, batch), (_, _, other, _) = scene("tla"), scene("none")
    first, second = (model(batch.inputs, batch.present, batch.present).logits for model in (one, other))
    assert torch.equal(probabilities(first, "binary"), probabilities(second, "binary"))
