"""What benchmarks write into docs/: sections that leave each other alone, tables and sentences that follow the numbers."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from gapweave.sites.simulate.compare_intervals import Draws
from gapweave.sites.simulate.compare_unit import Scores

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The scripts import each other by name, as Python runs them."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("results")
    for name in ("results", "recipes", "populations", "left_out", "planted", "page"):
        sys.modules.pop(name, None)


def test_a_section_is_replaced_and_the_others_stay(bench: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "results.md"
    for name, text in (("one", "first"), ("two", "second"), ("one", "third")):
        bench.write_section(name, text, file)
    text = file.read_text(encoding="utf-8")
    assert text == "# Results\n\n<!-- one -->\nthird\n<!-- /one -->\n\n<!-- two -->\nsecond\n<!-- /two -->\n"


def judged(bench: ModuleType) -> tuple[list, Draws]:
    """At two sites a good federated model beside a poor one under noise, a fair pooled and a useless local one."""
    rng, draws, models = np.random.default_rng(0), Draws("binary"), []
    target = {site: (rng.random(200) < 0.4).astype(float) for site in ("north", "south")}
    strength = {
        "plain": {"federated": 3.0, "best": 3.0, "own": 0.0, "lr_local": 0.0, "lr_pooled": 3.0},
        "private": {"federated": -1.0, "best": 0.0, "lr_pooled": 0.5},
    }
    noise = {site: rng.normal(0, 1, 200) for site in target}
    for recipe, found in strength.items():
        budget = 1.0 if recipe == "private" else None
        pooled = {}
        for site, labels in target.items():
            scores = {name: 1 / (1 + np.exp(-(of * labels + noise[site]))) for name, of in found.items()}
            pooled[site] = Scores(
                record=np.arange(200),
                patient=np.arange(200),
                target=labels[:, None],
                known=np.ones((200, 1), bool),
                models={name: np.stack([1 - of, of], 1) for name, of in scores.items()},
            )
        means = draws.add({"recipe": recipe, "budget": budget}, 0, pooled)
        models += [
            bench.Judged(recipe=recipe, budget=budget, model=name, auroc=(auroc,)) for name, auroc in means.items()
        ]
    return models, draws


def test_the_page_says_what_the_intervals_say(bench: ModuleType) -> None:
    models, draws = judged(bench)
    said = bench.gates(models, draws).splitlines()
    assert said[0].startswith("- No privacy: federated is better (+0.")
    assert "not told apart (+0.000) from the pooled linear model" in said[0]
    private = next(line for line in said if line.startswith("- Epsilon 1: federated"))
    assert "worse (-0." in private
    assert "better" not in private


def test_the_strongest_local_model_is_that_of_the_highest_mean(bench: ModuleType) -> None:
    models, draws = judged(bench)
    assert bench.strongest(models).model in ("own", "lr_local")
    table = bench.table(models, draws).splitlines()
    assert len({line.count("|") for line in table}) == 1
    assert sum(line.startswith("| federated |") for line in table) == 2


def test_pooled_models_are_those_of_their_best_recipe(bench: ModuleType) -> None:
    models, _ = judged(bench)
    assert bench.find(models, "lr_pooled").recipe == "plain"
    assert bench.find(models, "federated", 8.0) is None


def test_planted_labels_are_those_of_others(bench: ModuleType, tmp_path: Path) -> None:
    import polars as pl
    import populations  # type: ignore[import-not-found]

    from gapweave.sites.demo import write_demo
    from gapweave.sites.demo.world import LABEL

    write_demo(tmp_path / "demo", hospitals=1, patients=60)
    (file,) = tmp_path.rglob("records.csv")
    before = pl.read_csv(file)
    populations.shuffle_labels(file)
    after = pl.read_csv(file)
    assert after.drop(LABEL).equals(before.drop(LABEL))
    assert after[LABEL].sum() == before[LABEL].sum()
    assert not after[LABEL].equals(before[LABEL])
