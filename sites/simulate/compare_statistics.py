"""Means and paired differences of a comparison's rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

from gapweave.shared.joining import Interval
from gapweave.shared.metrics import METRICS
from gapweave.sites.simulate.compare_intervals import Draws
from gapweave.sites.simulate.compare_plan import Cell
from gapweave.sites.simulate.compare_unit import MODELS, Row

Aurocs = Mapping[tuple[str, int], float]
"""By site and seed."""


@dataclass(frozen=True, kw_only=True)
class Mean:
    """One model in one cell.

    Attributes:
        cell: varied key -> value.
        model: its name.
        sites: number of sites with rows.
        judged: number of them whose AUROC is defined, with every seed.
        by_seed: metric -> seed -> mean over the sites where it is defined.
        worst_site: the site with the lowest AUROC, averaged over seeds; None if undefined.
        worst: that AUROC.
        epsilon: the largest spent by a site; None without privacy.
    """

    cell: Cell
    model: str
    sites: int
    judged: int
    by_seed: Mapping[str, Mapping[int, float]]
    worst_site: str | None
    worst: float | None
    epsilon: float | None

    def mean(self, metric: str) -> float | None:
        """Mean over seeds of the mean over sites."""
        return _mean(self.by_seed[metric].values())

    def sd(self, metric: str) -> float | None:
        """Standard deviation over seeds of the mean over sites."""
        return _sd(self.by_seed[metric].values())


@dataclass(frozen=True, kw_only=True)
class Paired:
    """AUROC of one model minus that of another, paired by site and seed.

    Attributes:
        cell: of the first.
        model: the first.
        other_cell: of the second.
        other_model: the second.
        by_site: site -> mean difference over seeds.
        pairs: number of pairs.
        mean: over pairs; with folds, of the sites with enough patients to be judged.
        sd: over pairs; None for one pair.
        interval: 95 % interval of the mean over sites, patients and seeds resampled; None without folds.
    """

    cell: Cell
    model: str
    other_cell: Cell
    other_model: str
    by_site: Mapping[str, float]
    pairs: int
    mean: float
    sd: float | None
    interval: Interval = None

    @property
    def better(self) -> int:
        """Sites where the first is ahead."""
        return sum(value > 0 for value in self.by_site.values())

    @property
    def worse(self) -> int:
        """Sites where the first is behind."""
        return sum(value < 0 for value in self.by_site.values())


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What summary.md says.

    Attributes:
        means: by cell and model.
        against_models: federated minus each other model of its cell.
        against_first: each value of a varied key minus its first, by model; models that it leaves alone are not here.
    """

    means: list[Mean]
    against_models: list[Paired]
    against_first: list[Paired]

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        means = [
            {
                "cell": entry.cell,
                "model": entry.model,
                "sites": entry.sites,
                "judged": entry.judged,
                "metrics": {name: {"mean": entry.mean(name), "sd": entry.sd(name)} for name in METRICS},
                "worst": {"site": entry.worst_site, "auroc": entry.worst},
                "epsilon": entry.epsilon,
            }
            for entry in self.means
        ]
        return {
            "means": means,
            "against_models": [_paired_json(entry) for entry in self.against_models],
            "against_first": [_paired_json(entry) for entry in self.against_first],
        }


def _paired_json(entry: Paired) -> dict[str, Any]:
    return {**asdict(entry), "better": entry.better, "worse": entry.worse}


def statistics_of(rows: list[Row], vary: Mapping[str, list[Any]], draws: Draws | None = None) -> Statistics:
    """Statistics of the rows of results.json.

    Args:
        rows: as they are written.
        vary: key -> values, the first of which the others are compared with.
        draws: of the patients, for intervals.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((json.dumps(row["cell"]), row["model"]), []).append(row)
    cells = list({json.dumps(row["cell"]): row["cell"] for row in rows}.values())
    names = [name for name in MODELS if any(row["model"] == name for row in rows)]
    found = {key: group for key, group in groups.items() if group}

    def pair(cell: Cell, model: str, other_cell: Cell, other_model: str) -> Paired | None:
        first, second = found.get((json.dumps(cell), model)), found.get((json.dumps(other_cell), other_model))
        if not first or not second:
            return None
        told = draws.difference(cell, model, other_cell, other_model) if draws else None
        interval = told.interval if told else None
        if draws and interval:  # the difference is of the sites that the interval is of
            differences = _differences(draws.aurocs(cell, model), draws.aurocs(other_cell, other_model))
        else:
            differences = _differences(_aurocs(first), _aurocs(second))
        if not differences:
            return None
        return Paired(
            cell=cell,
            model=model,
            other_cell=other_cell,
            other_model=other_model,
            by_site=_by_site(differences),
            pairs=len(differences),
            mean=fmean(differences.values()),
            sd=_sd(differences.values()),
            interval=interval,
        )

    ours = [pair(cell, "federated", cell, name) for cell in cells for name in names if name != "federated"]
    theirs = [
        pair(cell, name, {**cell, key: values[0]}, name)
        for key, values in vary.items()
        for cell in cells
        if cell[key] != values[0]
        for name in names
    ]
    changed = [entry for entry in theirs if entry and (any(entry.by_site.values()) or entry.model == "federated")]
    return Statistics(
        means=[
            _group_mean(found[key]) for cell in cells for name in names if (key := (json.dumps(cell), name)) in found
        ],
        against_models=[entry for entry in ours if entry],
        against_first=changed,
    )


def _group_mean(rows: list[Row]) -> Mean:
    seeds = sorted({row["seed"] for row in rows})
    sites = sorted({row["site"] for row in rows})
    by_seed: dict[str, dict[int, float]] = {}
    for name in METRICS:
        values = {seed: _mean(_defined(rows, name, seed=seed)) for seed in seeds}
        by_seed[name] = {seed: value for seed, value in values.items() if value is not None}
    aurocs = {site: value for site in sites if (value := _mean(_defined(rows, "auroc", site=site))) is not None}
    worst = min(aurocs, key=lambda site: aurocs[site], default=None)
    return Mean(
        cell=rows[0]["cell"],
        model=rows[0]["model"],
        sites=len(sites),
        judged=sum(len(_defined(rows, "auroc", site=site)) == len(seeds) for site in sites),
        by_seed=by_seed,
        worst_site=worst,
        worst=None if worst is None else aurocs[worst],
        epsilon=max((row["epsilon"] for row in rows if row["epsilon"] is not None), default=None),
    )


def _defined(rows: list[Row], metric: str, **where: Any) -> list[float]:
    chosen = [row["metrics"][metric] for row in rows if all(row[key] == value for key, value in where.items())]
    return [value for value in chosen if value is not None]


def _differences(first: Aurocs, second: Aurocs) -> Aurocs:
    return {key: first[key] - second[key] for key in first if key in second}


def _by_site(values: Aurocs) -> dict[str, float]:
    """Mean over seeds."""
    sites = sorted({site for site, _ in values})
    return {site: fmean(value for (at, _), value in values.items() if at == site) for site in sites}


def _aurocs(rows: list[Row]) -> Aurocs:
    return {(row["site"], row["seed"]): value for row in rows if (value := row["metrics"]["auroc"]) is not None}


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return fmean(values) if values else None


def _sd(values: Iterable[float]) -> float | None:
    values = list(values)
    return stdev(values) if len(values) > 1 else None
