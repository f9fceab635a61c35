"""What the imputer learns: the conditional mean where that is known, and nothing by the objective as it was printed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from batches import four_kinds, patterns, random_batch, random_model
from sklearn.linear_model import RidgeCV
from torch import Tensor, nn

from gapweave.client.data import load_cohort
from gapweave.client.local_models import fit_network
from gapweave.shared.config import load_site, load_study
from gapweave.shared.imputers import IMPUTERS, Imputer
from gapweave.shared.model import Outputs
from gapweave.shared.objective import loss_terms
from gapweave.sites.demo import write_demo
from gapweave.sites.simulate.baselines import pool

M, D = 3, 2
PATTERNS = patterns("abc")[:-1]
"""All in which something is missing."""


def world(seed: int = 0) -> Tensor:
    """Covariance of three jointly Gaussian modalities of two numbers each, every number with variance 1."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(M * D, 3, generator=generator, dtype=torch.float64)
    covariance = factors @ factors.t() + 0.3 * torch.eye(M * D, dtype=torch.float64)
    scale = covariance.diagonal().rsqrt()
    return scale[:, None] * covariance * scale


def draw(covariance: Tensor, count: int, generator: torch.Generator) -> Tensor:
    root = torch.linalg.cholesky(covariance).float()
    return (torch.randn(count, M * D, generator=generator) @ root.t()).view(count, M, D)


def best(covariance: Tensor, used: Tensor) -> float:
    """R2 of the conditional mean of the hidden numbers: explained variance, of variance 1 each."""
    known = used.repeat_interleave(D)
    across = covariance[~known][:, known]
    explained = across @ torch.linalg.solve(covariance[known][:, known], across.t())
    return float(explained.diagonal().mean())


def r2(imputer: Imputer, values: Tensor, used: Tensor) -> float:
    """Of the hidden numbers of all records, about their mean 0."""
    shown = used.expand(len(values), -1)
    with torch.no_grad():
        estimate = imputer(torch.where(shown.unsqueeze(-1), values, imputer.tokens(len(values))), shown)
    return 1 - float((estimate - values)[:, ~used].square().mean() / values[:, ~used].square().mean())


def fit(imputer: Imputer, loss_of, covariance: Tensor, steps: int = 1500) -> float:
    """Train on fresh records; the last loss."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(imputer.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        values = draw(covariance, 512, generator)
        used = PATTERNS[torch.randint(len(PATTERNS), (512,), generator=generator)]
        loss = loss_of(imputer, values, used).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return float(loss.detach())


def ours(imputer: Imputer, values: Tensor, used: Tensor) -> Tensor:
    """What a study trains: the modalities hidden on purpose are the targets."""
    imputed = imputer(torch.where(used.unsqueeze(-1), values, imputer.tokens(len(values))), used)
    outputs = Outputs(
        logits=torch.zeros(len(values), 1),
        modality_logits=torch.zeros(len(values), M, 1),
        embeddings=values,
        imputed=imputed,
        present=torch.ones_like(used),
        used=used,
        weights=None,
        penalty=imputer.cycle(values, imputed, used),
    )
    unknown = torch.zeros(len(values), 1, dtype=torch.bool)
    return loss_terms(outputs, torch.zeros(len(values), 1), unknown, "binary").rest


def printed(imputer: Imputer, values: Tensor, used: Tensor) -> Tensor:
    """The paper's equations 5 and 7: zeros stand for what is missing, and what goes in is what has to come out."""
    given = torch.where(used.unsqueeze(-1), values, 0.0)
    return (imputer(given, used) - given).square().mean((1, 2))


@pytest.mark.no_cover
@pytest.mark.parametrize("name", [name for name in IMPUTERS if IMPUTERS[name].learns])
def test_an_imputer_comes_close_to_the_conditional_mean(name: str) -> None:
    covariance = world()
    torch.manual_seed(3)
    imputer = IMPUTERS[name](M, D)
    fit(imputer, ours, covariance)
    values = draw(covariance, 20_000, torch.Generator().manual_seed(2))
    for used in PATTERNS:
        bound = best(covariance, used)
        assert bound > 0.2, "there is something to learn"
        # Of 20,000 records R2 is known to about .005.
        assert bound - 0.02 <= r2(imputer, values, used) <= bound + 0.02


def test_the_objective_as_printed_is_met_by_an_imputer_that_does_nothing() -> None:
    # Believed (the paper's Eqs. 5 and 7): the cascade learns what is missing. True: no residual at all is optimal.
    covariance = world()
    torch.manual_seed(3)
    imputer = IMPUTERS["cra"](M, D)
    for stage in imputer.stages:
        nn.init.zeros_(stage.out.weight)
        nn.init.zeros_(stage.out.bias)
    values = draw(covariance, 1000, torch.Generator().manual_seed(2))
    every = PATTERNS[torch.arange(1000) % len(PATTERNS)]
    assert printed(imputer, values, every).max() == 0
    torch.manual_seed(3)
    trained = IMPUTERS["cra"](M, D)
    assert fit(trained, printed, covariance) < 2e-3
    for used in PATTERNS:
        assert r2(trained, values, used) < 0.05
        assert best(covariance, used) > 0.2


def test_the_way_back_by_hand() -> None:
    """It sees nothing of what was used, and its target is detached."""
    entry = IMPUTERS["cra_cycle"]
    imputer = entry(M, D, entry.Settings(backward=1.0))
    values = torch.randn(2, M, D, generator=torch.Generator().manual_seed(0), requires_grad=True)
    imputed = torch.randn(2, M, D, generator=torch.Generator().manual_seed(1), requires_grad=True)
    used = torch.tensor([[True, False, True], [True, True, True]])
    loss = imputer.cycle(values, imputed, used)
    assert loss[1] == 0, "nothing was imputed"
    seen = torch.stack([imputer.null.weight[0], imputed[0, 1], imputer.null.weight[2]])
    current, mask = seen.flatten()[None], torch.tensor([[0.0, 1.0, 0.0]])
    for stage in imputer.back:
        current = current + stage(current, mask)
    rebuilt = current.view(M, D)
    expected = ((rebuilt[0] - values[0, 0]).square().mean() + (rebuilt[2] - values[0, 2]).square().mean()) / 2
    torch.testing.assert_close(loss[0], expected)
    of_values, of_imputed = torch.autograd.grad(loss.sum(), [values, imputed], allow_unused=True)
    assert of_values is None
    assert of_imputed[0, 1].any()
    assert not of_imputed[0, [0, 2]].any()


def test_the_way_back_changes_no_prediction() -> None:
    of = four_kinds("concat", "cra_cycle")
    model, batch = random_model(of), random_batch(of)
    before = model(batch.inputs, batch.present, batch.present)
    for parameter in model.imputer.back.parameters():
        parameter.data.add_(1)
    after = model(batch.inputs, batch.present, batch.present)
    assert torch.equal(after.logits, before.logits)
    assert not torch.equal(after.penalty, before.penalty)


def of_the_others(embeddings: Tensor, present: Tensor, hidden: int) -> Tensor:
    """What a linear judge reads of the other modalities: embeddings, pattern, and pairs of the pattern."""
    others = [at for at in range(present.shape[1]) if at != hidden]
    pattern = present[:, others].float()
    return torch.cat(
        [embeddings[:, others].flatten(1), pattern, (pattern[:, :, None] * pattern[:, None]).flatten(1)], 1
    )


def explained(guess: Tensor, truth: Tensor) -> float:
    return 1 - float((guess - truth).square().sum() / (truth - truth.mean(0)).square().sum())


@pytest.mark.long
def test_on_the_demo_the_imputer_explains_what_the_others_tell_of_a_modality(tmp_path: Path) -> None:
    """Held-out patients of all hospitals, nothing noised; ridge regression says of which modalities the others tell."""
    study_file = write_demo(tmp_path / "demo")
    settings = {
        "imputer": "cra",
        "fusion": "late",
        "training.rounds": 60,
        "training.momentum": 0.9,
        "training.batch": 384,
    }
    study = load_study(study_file, settings)
    files = sorted((tmp_path / "demo" / "sites").glob("*.yaml"))
    cohorts = [load_cohort(study, load_site(file), site_file=file) for file in files]
    training = pool(study, [cohort.training() for cohort in cohorts])
    testing = pool(study, [cohort.testing() for cohort in cohorts])
    model = fit_network(study, training, list(study.order), "pooled").model
    told = []
    with torch.no_grad():
        known, asked = (
            model.embed(model.ready(batch.inputs, batch.present), batch.present) for batch in (training, testing)
        )
        for at, name in enumerate(study.order):
            learn, judge = (batch.present[:, at] & (batch.present.sum(1) > 1) for batch in (training, testing))
            ridge = RidgeCV(alphas=(1, 10, 100, 1000))
            ridge.fit(of_the_others(known, training.present, at)[learn].numpy(), known[learn, at].numpy())
            linear = torch.from_numpy(ridge.predict(of_the_others(asked, testing.present, at)[judge].numpy()))
            if explained(linear, asked[judge, at]) < 0.15:
                continue
            used = testing.present.clone()
            used[:, at] = False
            imputed = model.decide(
                asked, testing.present, used, model.votes(asked, model.ready(testing.inputs, testing.present))
            ).imputed
            assert explained(imputed[judge, at], asked[judge, at]) > 0, name
            told.append(name)
    assert "labs" in told
