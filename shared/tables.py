"""Metrics from noised tables of counts: all that a server learns of how well a model does at a deployed site.

A table counts test patients, one index record each, by label and by the bin of the predicted probability. Bin
edges are public. What is not in a table is estimated: within a bin, each class has a density that is linear on the
scale of the log-odds, with the slope that the neighbouring bins suggest.

Guarantee: everything here is computed from tables that were released; it costs no privacy.

| edge case                                | answer                                                     |
|------------------------------------------|------------------------------------------------------------|
| fewer than `FEWEST` patients in it       | all metrics None                                           |
| fewer than `FEWEST_EVENTS` of a class    | AUROC and AUPRC None                                       |
| most scores fall into one bin or two     | AUROC and AUPRC None                                       |
| noise alone could make such numbers      | the same: the bounds are at least `CLEAR` sd of the noise  |
| cells below 0                            | projected: non-negative, with the row's noised sum kept    |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gapweave.shared.errors import GapweaveError
from gapweave.shared.metrics import METRICS

EDGES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9)
"""Public edges of the probability bins: finer where outcomes are rare, as most clinical ones are."""
BINS = len(EDGES) + 1
MOST_IN_A_CELL = 1e9
"""Magnitude beyond which a count is none: no hospital has as many patients, and sums of larger ones overflow."""
ENDS = (0.005, 0.995)
"""Outer ends of the first and the last bin, where densities are drawn on the log-odds scale."""
PARTS = 8
"""Parts of a bin over which its linear density is spread."""
STEEPEST = 2.0
"""Slope of a linear density that falls to 0 at one end of its bin."""
UNKNOWN_SLOPE = 1.0
"""By how much a slope may differ from what the neighbouring bins suggest, in intervals."""
FEWEST, FEWEST_EVENTS = 50, 10
"""Patients and events below which nothing is said; compared with noised numbers."""
CLEAR = 3.0
"""How many standard deviations of their noise these numbers must reach."""
COARSEST = 0.4
"""Share of pairs of a positive and a negative patient in one bin, above which a table cannot rank."""
REPLICATES = 400
"""Simulated tables behind an interval."""

Array = NDArray[np.float64]
Scores = dict[str, Any]
"""`auroc` and so on, each with `auroc_interval`: two numbers, or None."""


@dataclass(frozen=True, kw_only=True)
class ScoreTable:
    """Counts of one two-class problem.

    Attributes:
        counts: [2, BINS], negatives and positives by score bin; with noise, so that cells may be below 0.
        scale: of the discrete Laplace noise in each cell; 0 for none.
        draws: noise draws in each cell: the number of sites whose tables were added.
    """

    counts: Array
    scale: float
    draws: int = 1

    @property
    def noise_sd(self) -> float:
        """Standard deviation of the noise of one cell."""
        return float(np.sqrt(self.draws * _laplace_variance(self.scale)))


def bin_of(probability: Array) -> NDArray[np.int64]:
    """Score bin of each probability; one that is no number falls into the last bin."""
    return np.searchsorted(np.array(EDGES), probability, side="right").astype(np.int64)


def add_tables(tables: Sequence[ScoreTable]) -> ScoreTable:
    """One table of all sites' patients.

    Raises:
        GapweaveError: when there is none, or their noise differs.
    """
    if len({table.scale for table in tables}) != 1:
        raise GapweaveError("only tables of equal noise can be added", remedy="Add tables of one study")
    return ScoreTable(
        counts=np.sum([table.counts for table in tables], axis=0),
        scale=tables[0].scale,
        draws=sum(table.draws for table in tables),
    )


@dataclass(frozen=True, kw_only=True)
class _Estimate:
    """One metric of one table, or a mean over tables.

    Attributes:
        point: the estimate.
        replicates: [REPLICATES], the same of simulated tables.
        faultless: [REPLICATES], of an error: what a model without any gives; None for what is no error.
    """

    point: float
    replicates: Array
    faultless: Array | None = None

    def each(self, change: Callable[[Array], Array]) -> _Estimate:
        """With what was simulated changed."""
        faultless = None if self.faultless is None else change(self.faultless)
        return replace(self, replicates=change(self.replicates), faultless=faultless)

    def interval(self) -> list[float]:
        """Of 95 %, from 0 where a faultless model may give as much: noise makes an error, and never takes one off.

        It reaches 1.96 times the root mean square distance of the replicates to each side: what noise does to the
        estimate on average makes it wider, instead of being taken off an estimate that it may not have moved.
        """
        reach = 1.96 * float(np.sqrt(np.mean((self.replicates - self.point) ** 2)))
        zero = self.faultless is not None and self.point <= np.quantile(self.faultless, 0.975)
        return [0.0 if zero else max(0.0, self.point - reach), min(1.0, self.point + reach)]


def table_metrics(tables: Sequence[ScoreTable], seed: int = 0) -> Scores:
    """AUROC, AUPRC, Brier score and expected calibration error, with 95 % intervals.

    The intervals simulate what separates a table from the population: patients drawn again, noise added again, and
    densities within bins that are not what the neighbours suggest. Several tables (one a class or label) are
    averaged, as `exact_metrics` does; the calibration error is over the table's own bins.

    Args:
        tables: one for binary, else one a class or label.
        seed: of the simulation; public.
    """
    return _with_intervals(_of_site(tables, seed))


def mean_table_metrics(sites: Iterable[Sequence[ScoreTable]]) -> Scores:
    """Mean over sites of each metric where it is defined, with 95 % intervals; by site, tables as of `table_metrics`.

    What patients and noise do differs from site to site, and grows less with more of them; what bins and noise do on
    average does not: noise always makes a calibration error.
    """
    found = [_of_site(tables, seed) for seed, tables in enumerate(sites)]
    return _with_intervals(
        {name: _mean(defined) for name in METRICS if (defined := [one[name] for one in found if name in one])}
    )


def _of_site(tables: Sequence[ScoreTable], seed: int) -> dict[str, _Estimate]:
    """Means over a site's tables, of the metrics that are defined.

    The tables count the same patients. How much labels go together is not in them, so the replicates are added as if
    what moves one moved all: the interval of a mean is the mean of the intervals.
    """
    generator = np.random.default_rng(seed)
    columns = [_estimates(table, generator) for table in tables]
    result = {}
    for name in METRICS:
        defined = [column[name] for column in columns if name in column]
        if defined:
            result[name] = _mean([one.each(np.sort) for one in defined]).each(generator.permutation)
    return result


def _mean(estimates: Sequence[_Estimate]) -> _Estimate:
    """Of one metric."""
    faultless = [one.faultless for one in estimates if one.faultless is not None]
    return _Estimate(
        point=float(np.mean([one.point for one in estimates])),
        replicates=np.mean([one.replicates for one in estimates], axis=0),
        faultless=np.mean(faultless, axis=0) if faultless else None,
    )


def _with_intervals(estimates: Mapping[str, _Estimate]) -> Scores:
    """Points and intervals; None for what is not defined."""
    result: Scores = {}
    for name in METRICS:
        of = estimates.get(name)
        result |= {name: of and of.point, f"{name}_interval": of and of.interval()}
    return result


def _estimates(table: ScoreTable, generator: np.random.Generator) -> dict[str, _Estimate]:
    """The metrics that are defined."""
    ranked, scored = _enough(table)
    if not scored:
        return {}
    counts = nonnegative(table.counts)
    ranked = ranked and _ties(counts) <= COARSEST
    spread = _refined(counts, _slopes(counts))
    points, replicates = _metrics(spread), _metrics(_again(counts, table, generator))
    faultless = {"ece": _metrics(_again(_calibrated(spread), table, generator))["ece"]}
    return {
        name: _Estimate(point=float(points[name]), replicates=replicates[name], faultless=faultless.get(name))
        for name in (METRICS if ranked else ("brier", "ece"))
    }


def _enough(table: ScoreTable) -> tuple[bool, bool]:
    """Whether the classes, and whether the patients, are clearly enough."""
    rows, noise = table.counts.sum(1), table.noise_sd * np.sqrt(BINS)
    scored = rows.sum() >= max(FEWEST, CLEAR * noise * np.sqrt(2))
    return bool(scored and rows.min() >= max(FEWEST_EVENTS, CLEAR * noise)), bool(scored)


def _ties(counts: Array) -> float:
    """Share of pairs of a positive and a negative patient that are in one bin."""
    negative, positive = counts
    return float((negative * positive).sum() / (negative.sum() * positive.sum()))


def _again(counts: Array, table: ScoreTable, generator: np.random.Generator) -> Array:
    """[REPLICATES, 2, BINS, PARTS]: as many patients drawn from these counts, noise as in the table, other slopes."""
    total = counts.sum()
    drawn = generator.multinomial(round(total), (counts / total).ravel(), REPLICATES).astype(np.float64)
    for _ in range(table.draws if table.scale > 0 else 0):
        drawn += laplace_noise(table.scale, drawn.shape, generator)
    drawn = nonnegative(drawn.reshape(REPLICATES, *counts.shape))
    slopes = _slopes(drawn) + generator.uniform(-UNKNOWN_SLOPE, UNKNOWN_SLOPE, drawn.shape)
    return _refined(drawn, slopes.clip(-STEEPEST, STEEPEST))


def _calibrated(spread: Array) -> Array:
    """[2, BINS]: the same scores, were each the frequency of its outcome."""
    patients = spread.sum(-3)
    positive = (patients * _SCORES).sum(-1)
    return np.stack([patients.sum(-1) - positive, positive])


def laplace_noise(scale: float, shape: tuple[int, ...], generator: np.random.Generator) -> Array:
    """Discrete Laplace noise for simulations; a site's own noise is secret and comes from `privacy/draws.py`."""
    stop = -np.expm1(-1 / scale)
    return (generator.geometric(stop, shape) - generator.geometric(stop, shape)).astype(np.float64)


def _laplace_variance(scale: float) -> float:
    if scale == 0:
        return 0.0
    ratio = np.exp(-1 / scale)
    return float(2 * ratio / (1 - ratio) ** 2)


def nonnegative(counts: Array) -> Array:
    """The nearest non-negative rows with the same sums (projection on a simplex): [..., BINS].

    A row's sum keeps its noise, which is unbiased; cutting cells at 0 alone would add patients that are not there.

    Reference: Duchi et al., ICML 2008, figure 1.
    """
    total = np.maximum(counts.sum(-1, keepdims=True), 0.0)
    ordered = -np.sort(-counts, axis=-1)
    size = np.arange(1, counts.shape[-1] + 1)
    excess = (np.cumsum(ordered, axis=-1) - total) / size
    kept = np.maximum((ordered > excess).sum(-1, keepdims=True), 1)
    projected: Array = np.maximum(counts - np.take_along_axis(excess, kept - 1, axis=-1), 0.0)
    return projected


def _log_odds(probability: Array) -> Array:
    return np.log(probability / (1 - probability))


_BORDERS = _log_odds(np.array([ENDS[0], *EDGES, ENDS[1]]))
_WIDTHS = np.diff(_BORDERS)
_PLACES = (np.arange(PARTS) + 0.5) / PARTS - 0.5
"""Middles of a bin's parts, on a bin from -1/2 to 1/2."""
_SCORES = 1 / (1 + np.exp(-(_BORDERS[:-1, None] + _WIDTHS[:, None] * (_PLACES + 0.5))))
"""[BINS, PARTS]: the probability that each part stands for."""


def _slopes(counts: Array) -> Array:
    """Slope of the density within each bin, a bin's width being 1, from the bins beside it."""
    density = counts / _WIDTHS
    padded = np.concatenate([density[..., :1], density, density[..., -1:]], axis=-1)
    rise = (padded[..., 2:] - padded[..., :-2]) / 2
    slopes: Array = np.clip(rise / np.maximum(density, 1e-9), -STEEPEST, STEEPEST)
    return slopes


def _refined(counts: Array, slopes: Array) -> Array:
    """[..., 2, BINS, PARTS]: each cell spread over the parts of its bin."""
    shares = (1 + slopes[..., None] * _PLACES) / PARTS
    spread: Array = counts[..., None] * shares
    return spread


def _metrics(spread: Array) -> dict[str, Array]:
    """Metrics of [..., 2, BINS, PARTS]; a class without patients gives a meaningless number, never an error."""
    flat = spread.reshape(*spread.shape[:-2], -1)
    negative, positive = flat[..., 0, :], flat[..., 1, :]
    total = np.maximum(flat.sum((-1, -2)), 1e-9)
    score = _SCORES.ravel()
    brier = (negative * score**2 + positive * (1 - score) ** 2).sum(-1) / total
    in_bin = spread.sum(-3)
    gap = np.abs((in_bin * _SCORES).sum(-1) - spread[..., 1, :, :].sum(-1)).sum(-1)
    return {
        "auroc": _auroc(negative, positive),
        "auprc": _auprc(negative, positive),
        "brier": brier,
        "ece": gap / total,
    }


def _auroc(negative: Array, positive: Array) -> Array:
    below = np.cumsum(negative, axis=-1) - negative / 2
    pairs = negative.sum(-1) * positive.sum(-1)
    area: Array = (positive * below).sum(-1) / np.maximum(pairs, 1e-9)
    return area


def _auprc(negative: Array, positive: Array) -> Array:
    """Average precision; precision within a part is that at its middle."""
    hits = positive[..., ::-1].cumsum(-1)[..., ::-1] - positive / 2
    alarms = negative[..., ::-1].cumsum(-1)[..., ::-1] - negative / 2
    precision = hits / np.maximum(hits + alarms, 1e-9)
    area: Array = (positive * precision).sum(-1) / np.maximum(positive.sum(-1), 1e-9)
    return area


def read_tables(content: Any, problems: int, scale: float) -> list[ScoreTable] | None:
    """Tables as a site sends them, or None for anything else.

    Args:
        content: [problems, 2, BINS] nested lists of whole numbers.
        problems: number of tables asked for.
        scale: of their noise.
    """
    try:
        counts = np.array(content)
    except ValueError:
        return None
    if counts.shape != (problems, 2, BINS) or counts.dtype != np.int64:
        return None
    if not (np.abs(counts.astype(np.float64)) <= MOST_IN_A_CELL).all():
        return None
    return [ScoreTable(counts=each.astype(np.float64), scale=scale) for each in counts]


def pooled(sites: Iterable[Sequence[ScoreTable]]) -> list[ScoreTable]:
    """One table a class or label, over all sites; empty without a site."""
    return [add_tables(column) for column in zip(*sites, strict=True)]
