"""How far patients, splits and noise let one tell two models of a comparison apart.

Each site's patients are resampled; the resamples are the same for every model, cell and seed, so that differences are
paired by patient. Seeds split the same patients into other folds and draw other noise: what that may change is in each
draw too, alike for all models and sites.
"""

from __future__ import annotations

import json
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from gapweave.shared.joining import Interval
from gapweave.shared.judging import FEWEST
from gapweave.shared.objective import TaskKind
from gapweave.shared.paired import DRAWS, SEED, Bootstrap, Truth, interval
from gapweave.sites.simulate.compare_plan import Cell
from gapweave.sites.simulate.compare_unit import Scores

Array = NDArray[np.float64]


class Draws:
    """AUROCs of resamples of patients, by cell and model.

    Args:
        kind: of the task.
    """

    def __init__(self, kind: TaskKind) -> None:
        self._kind = kind
        self._bootstraps: dict[tuple[str | bytes, ...], Bootstrap | None] = {}
        self._found: dict[tuple[str, str], dict[str, dict[int, Array]]] = {}

    def add(self, cell: Cell, seed: int, scores: dict[str, Scores]) -> dict[str, float]:
        """Take in a cell's scores of one seed; gives each model's mean AUROC over the sites that are judged.

        Args:
            cell: of the comparison.
            seed: of training and split.
            scores: out of fold, by site. A site with fewer than 8 patients of a class is left out.
        """
        found: dict[str, list[float]] = {}
        for site, of in scores.items():
            order = np.argsort(of.record, kind="stable")
            bootstrap = self._of_site(site, of, order)
            if bootstrap is not None:
                for model, values in of.models.items():
                    by_site = self._found.setdefault((json.dumps(cell), model), {})
                    by_site.setdefault(site, {})[seed] = bootstrap.aurocs(values[order])
                    found.setdefault(model, []).append(float(by_site[site][seed][0]))
        return {model: fmean(values) for model, values in found.items()}

    def _of_site(self, site: str, of: Scores, order: NDArray[np.int64]) -> Bootstrap | None:
        """The resamples of a site's patients; None for one with too few to judge by."""
        records, target, known = of.record[order], of.target[order], of.known[order]
        fold = None if of.fold is None else of.fold[order]
        key: tuple[str | bytes, ...] = (
            site,
            *(b"" if one is None else one.tobytes() for one in (records, target, known, fold)),
        )
        if key not in self._bootstraps:
            patients, patient = np.unique(of.patient[order], return_inverse=True)
            truth = Truth(
                target=target, known=known, patient=patient, patients=len(patients), kind=self._kind, fold=fold
            )
            enough = truth.patients > 0 and truth.rarer() >= FEWEST
            self._bootstraps[key] = Bootstrap(truth) if enough else None
        return self._bootstraps[key]

    def sites(self, cell: Cell, model: str) -> dict[str, Array]:
        """By site, [1 + draws]: AUROC, mean over seeds; first of patients and seeds as they are, then resampled."""
        by_site = self._found.get((json.dumps(cell), model), {})
        return {site: _over_seeds(np.stack([of[seed] for seed in sorted(of)])) for site, of in by_site.items()}

    def aurocs(self, cell: Cell, model: str) -> dict[tuple[str, int], float]:
        """By judged site and seed: AUROC of the patients as they are."""
        by_site = self._found.get((json.dumps(cell), model), {})
        return {(site, seed): float(values[0]) for site, of in by_site.items() for seed, values in of.items()}

    def difference(self, cell: Cell, model: str, other_cell: Cell, other_model: str) -> Interval:
        """The interval of the first model's mean AUROC minus the second's, of the sites and seeds that both have."""
        first, second = (
            self._found.get((json.dumps(of), name), {}) for of, name in ((cell, model), (other_cell, other_model))
        )
        differences = [
            np.stack([first[site][seed] - second[site][seed] for seed in sorted(seeds)])
            for site in first
            if (seeds := first[site].keys() & second.get(site, {}).keys())
        ]
        return interval(np.mean([_over_seeds(of) for of in differences], 0)) if differences else None


def _over_seeds(aurocs: Array) -> Array:
    """Mean over seeds; each draw is off by what seeds may make it.

    A draw's seeds are weighed by normal numbers, the same for all models and sites, so that they move its mean as far
    as its standard error says, times what makes a normal number one of Student's t: of three splits the spread is
    hardly known, and drawing from them with replacement gave intervals that hold the truth in 75 % where splits are
    all that varies. From one seed nothing can be told.

    Args:
        aurocs: [seeds, 1 + draws], of one model or a difference.
    """
    seeds = len(aurocs)
    means: Array = np.mean(aurocs, 0)
    if seeds > 1:
        random = np.random.default_rng(SEED)
        normal, squares = random.normal(size=(seeds, DRAWS)), random.chisquare(seeds - 1, DRAWS)
        means[1:] += (normal * (aurocs - means)[:, 1:]).sum(0) / np.sqrt(seeds * squares)
    return means
