"""How far patients, splits and noise let one tell two models of a comparison apart.

Each site's patients are resampled; the resamples are the same for every model, cell and seed, so that differences are
paired by patient. Seeds split the same patients into other folds and draw other noise: what that may change is in each
draw too, alike for all models and sites.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
Part = Mapping[str, Mapping[int, Array]]
"""By site and seed, [1 + draws]: AUROC or a difference, of patients as they are and resampled."""


class Draws:
    """AUROCs of resamples of patients, by cell and model.

    Args:
        kind: of the task.
    """

    def __init__(self, kind: TaskKind) -> None:
        self._kind = kind
        self._weights: dict[tuple[str, bytes], Array] = {}
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
        patients, patient = np.unique(of.patient[order], return_inverse=True)
        truth = Truth(
            target=of.target[order],
            known=of.known[order],
            patient=patient,
            patients=len(patients),
            kind=self._kind,
            fold=None if of.fold is None else of.fold[order],
        )
        if not (truth.patients and truth.rarer() >= FEWEST):
            return None
        key = (site, patient.tobytes())
        bootstrap = Bootstrap(truth, self._weights.get(key))
        self._weights[key] = bootstrap.weights
        return bootstrap

    def aurocs(self, cell: Cell, model: str) -> dict[tuple[str, int], float]:
        """By judged site and seed: AUROC of the patients as they are."""
        by_site = self._found.get((json.dumps(cell), model), {})
        return {(site, seed): float(values[0]) for site, of in by_site.items() for seed, values in of.items()}

    def difference(
        self, cell: Cell, model: str, other_cell: Cell, other_model: str, *, all_seeds: bool = False
    ) -> Difference | None:
        """The first model's AUROC minus the second's; None where no site was judged with both in one seed.

        Args:
            cell: of the first model.
            model: its name.
            other_cell: of the second.
            other_model: its name.
            all_seeds: where they have not the same seeds, take all of each, unpaired, in place of those of both.
        """
        first, second = (
            self._found.get((json.dumps(of), name), {}) for of, name in ((cell, model), (other_cell, other_model))
        )
        sites = [site for site in first if site in second]
        if all_seeds and any(first[site].keys() != second[site].keys() for site in sites):
            minus = {site: {seed: -values for seed, values in second[site].items()} for site in sites}
            parts = [{site: first[site] for site in sites}, minus]
        else:
            parts = [
                {
                    site: {seed: first[site][seed] - second[site][seed] for seed in sorted(seeds)}
                    for site in sites
                    if (seeds := first[site].keys() & second[site].keys())
                }
            ]
        return Difference.of(parts) if parts[0] else None


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One model's AUROC minus another's.

    Attributes:
        mean: over the sites that both were judged at, of the mean over seeds.
        interval: of 95 %.
        sites: the same two of each site.
    """

    mean: float
    interval: Interval
    sites: Mapping[str, tuple[float, Interval]]

    @classmethod
    def of(cls, parts: Sequence[Part]) -> Difference:
        """The sum of parts, whose seeds are their own; by site and seed, [1 + draws] each."""
        whole = _drawn(parts)
        by_site = {site: _drawn([{site: part[site]} for part in parts]) for site in parts[0]}
        return cls(
            mean=float(whole[0]),
            interval=_possible(interval(whole)),
            sites={site: (float(values[0]), _possible(interval(values))) for site, values in by_site.items()},
        )


def _possible(found: Interval) -> Interval:
    """What of an interval can be: no two AUROCs differ by more than 1, which Student's t does not know."""
    return None if found is None else (max(found[0], -1.0), min(found[1], 1.0))


def _drawn(parts: Sequence[Part]) -> Array:
    """[1 + draws]: the sum of means over sites and seeds, first as found, then as patients and seeds may change it.

    Seeds are few, and what their mean may be off by is hardly known: drawing three of them again gave intervals that
    hold the truth in 75 % where seeds are all that varies. So each draw is off by a normal number of their standard
    error, and all are stretched as Student's t asks for with the degrees of freedom that patients and seeds have
    together (Welch 1947, Biometrika 34; Satterthwaite 1946). What a seed does at several sites is one thing. From one
    seed nothing can be told.

    Args:
        parts: by site and seed, [1 + draws] each; of seeds of their own.
    """
    values: Array = np.sum([np.mean([np.mean([*of.values()], 0) for of in part.values()], 0) for part in parts], 0)
    errors = [error for part in parts if (error := _of_seeds(part))[0] > 0]
    if not errors:
        return values
    from scipy.stats import norm, t

    seeds = sum(error for error, _ in errors)
    freedom = (np.nanvar(values[1:]) + seeds) ** 2 / sum(error**2 / degrees for error, degrees in errors)
    noise = np.random.default_rng(SEED).normal(0, np.sqrt(seeds), DRAWS)
    values[1:] = values[0] + (values[1:] - values[0] + noise) * (t.ppf(0.975, freedom) / norm.ppf(0.975))
    return values


def _of_seeds(part: Part) -> tuple[float, int]:
    """Variance of a mean over sites and seeds that the seeds make, each alike at all sites; its degrees of freedom.

    Of a site with one seed nothing can be told. Each site's deviations are of its own mean, hence n / (n - 1).
    """
    off: dict[int, float] = {}
    for of in part.values():
        seeds, mean = len(of), fmean(float(values[0]) for values in of.values())
        for seed, values in of.items() if seeds > 1 else ():
            share = math.sqrt(seeds / (seeds - 1)) / (seeds * len(part))
            off[seed] = off.get(seed, 0.0) + (float(values[0]) - mean) * share
    return sum(value**2 for value in off.values()), max(1, len(off) - 1)
