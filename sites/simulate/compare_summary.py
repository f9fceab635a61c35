"""A comparison for people: summary.md, and the table on the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from gapweave.shared import __version__
from gapweave.shared.joining import Interval
from gapweave.shared.judging import FEWEST
from gapweave.sites.simulate.compare_plan import Cell, Plan
from gapweave.sites.simulate.compare_statistics import Mean, Paired, Statistics

if TYPE_CHECKING:
    from rich.table import Table


def cell_name(cell: Cell) -> str:
    """A cell, for people."""
    return ", ".join(f"{key}={value}" for key, value in cell.items()) or "the study"


def model_name(name: str) -> str:
    """A model, for people."""
    return name.replace("_", " ")


def number(value: float | None, sign: bool = False) -> str:
    """Three digits, or a dash for what is undefined."""
    return "-" if value is None else f"{value:+.3f}" if sign else f"{value:.3f}"


HEADS = ("cell", "model", "sites", "AUROC", "worst site", "AUPRC", "Brier", "ECE", "epsilon")


def mean_cells(entry: Mean) -> list[str]:
    """A row of the table of means."""
    spread = entry.sd("auroc")
    auroc = number(entry.mean("auroc")) + ("" if spread is None else f" ± {spread:.3f}")
    worst = "-" if entry.worst_site is None else f"{entry.worst_site} {number(entry.worst)}"
    rest = [number(entry.mean(name)) for name in ("auprc", "brier", "ece")]
    spent = "-" if entry.epsilon is None else f"{entry.epsilon:.2f}"
    sites = str(entry.sites) if entry.judged == entry.sites else f"{entry.judged} of {entry.sites}"
    return [cell_name(entry.cell), model_name(entry.model), sites, auroc, worst, *rest, spent]


def tables(statistics: Statistics) -> Iterator[Table]:
    """The means for a terminal, one table a cell."""
    from rich import box
    from rich.table import Table

    for _, entries in groupby(statistics.means, lambda entry: entry.cell):
        rows = [(entry.model, mean_cells(entry)) for entry in entries]
        result = Table(title=rows[0][1][0], title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for head in HEADS[1:]:
            result.add_column(head, justify="left" if head in ("model", "worst site") else "right", no_wrap=True)
        for model, cells in rows:
            result.add_row(*cells[1:], style="bold" if model == "federated" else None)
        yield result


def markdown(plan: Plan, statistics: Statistics, *, seconds: float, failures: list[str]) -> str:
    """The text of summary.md.

    Args:
        plan: what was asked for.
        statistics: of the rows.
        seconds: that the units took together.
        failures: units that could not be run.
    """
    parts = [f"# Comparison of {plan.study}", _what_ran(plan, seconds)]
    if failures:
        parts += ["## Not done", "\n".join(f"- {line}" for line in failures)]
    parts += ["## Does federation pay?", _verdicts(statistics), "## Means", _NOTE]
    if any(entry.model == "best" for entry in statistics.means):
        parts.append(_CHOICES)
    parts.append(_lines(HEADS, [mean_cells(entry) for entry in statistics.means]))
    if statistics.against_models:
        parts += ["## Federated minus each other model: AUROC, paired by site and seed"]
        parts.append(_models_table(statistics.against_models))
    if statistics.against_first:
        parts += ["## Each value minus the first of its key: AUROC, paired by site and seed"]
        parts.append(_first_table(statistics.against_first))
    return "\n\n".join(parts) + "\n"


_NOTE = (
    "Each metric: mean over sites, then over seeds (± standard deviation over seeds); worst site: lowest mean "
    "AUROC; epsilon: the most that a site spent. Metrics are exact (simulation). Baselines train without privacy. "
    "Seeds are not new patients: their spread is no confidence interval. With folds, AUROC and AUPRC rank the patients "
    "of a fold among each other, and differences have the 95 % interval of 1,000 resamples of each site's patients and "
    "of what several seeds may change, alike for every model and cell; one that holds 0 is not told apart from chance. "
    "Both are over the sites with "
    f"{FEWEST} or more patients of each class; *sites* counts those where the AUROC is defined."
)
_CHOICES = (
    "*own*: the best that a site has alone, by its training patients; *score local*: its best model beside a public "
    "score; *blend*: federated and own; *best*: federated, own or the blend, whichever `predict` takes."
)


def _what_ran(plan: Plan, seconds: float) -> str:
    cells = len(plan.trials) // len(plan.seeds)
    folds = "" if plan.folds is None else f" x {plan.folds} folds by patient"
    baselines = ", ".join(plan.baselines) or "none"
    return (
        f"{_count(cells, 'cell')} x {_count(len(plan.seeds), 'seed')}{folds}: {_count(len(plan.units), 'simulation')} "
        f"in {_duration(seconds)}, Gapweave {__version__}. Baselines: {baselines}."
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _verdicts(statistics: Statistics) -> str:
    if not statistics.against_models:
        return "No other model was run: give `--baselines local,pooled,lr,gbm` to see whether federation pays."
    cells = {json.dumps(entry.cell): entry.cell for entry in statistics.against_models}
    return "\n".join(
        _verdict(cell, [entry for entry in statistics.against_models if entry.cell == cell]) for cell in cells.values()
    )


def _verdict(cell: Cell, entries: list[Paired]) -> str:
    verbs = ("loses to", "was below", "had no other AUROC than", "is not told apart from", "was above", "is ahead of")
    groups = {verb: [entry for entry in entries if _standing(entry) == verb] for verb in verbs}
    parts = [f"{verb} {', '.join(_margin(entry) for entry in group)}" for verb, group in groups.items() if group]
    return f"- {cell_name(cell)}: federated {'; it '.join(parts)}."


def _standing(entry: Paired) -> str:
    """How the first model does against the second; without an interval, how the means of this run lie."""
    if entry.interval is None:
        return "had no other AUROC than" if entry.mean == 0 else "was below" if entry.mean < 0 else "was above"
    low, high = entry.interval
    return "is not told apart from" if low <= 0 <= high else "loses to" if high < 0 else "is ahead of"


def _margin(entry: Paired) -> str:
    sites = f"better at {entry.better} of {len(entry.by_site)} sites, worse at {entry.worse}"
    return f"{model_name(entry.other_model)} ({number(entry.mean, sign=True)}, {sites})"


def _models_table(entries: list[Paired]) -> str:
    heads = ("cell", "against", *DIFFERENCE_HEADS)
    return _lines(
        heads, [[cell_name(entry.cell), model_name(entry.other_model), *_difference(entry)] for entry in entries]
    )


def _first_table(entries: list[Paired]) -> str:
    heads = ("cell", "against", "model", *DIFFERENCE_HEADS)
    names = [[cell_name(entry.cell), cell_name(entry.other_cell), model_name(entry.model)] for entry in entries]
    return _lines(heads, [[*name, *_difference(entry)] for name, entry in zip(names, entries, strict=True)])


DIFFERENCE_HEADS = ("difference", "95 % interval", "sd", "pairs", "sites better", "sites worse")


def _difference(entry: Paired) -> list[str]:
    counts = [str(value) for value in (entry.pairs, entry.better, entry.worse)]
    return [number(entry.mean, sign=True), interval_text(entry.interval), number(entry.sd), *counts]


def interval_text(interval: Interval) -> str:
    """An interval of a difference, or a dash."""
    return "-" if interval is None else f"{interval[0]:+.3f} to {interval[1]:+.3f}"


def _lines(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
