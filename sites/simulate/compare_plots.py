"""Plots of a comparison as SVG: the same statistics give the same bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gapweave.sites.simulate.compare_statistics import Mean, Paired, Statistics
from gapweave.sites.simulate.compare_summary import cell_name, model_name
from gapweave.sites.simulate.compare_unit import MODELS

COLOURS = (
    "#0072B2", "#56B4E9", "#332288", "#44AA99", "#882255", "#AA4499",
    "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#999999", "#000000",
)  # fmt: skip
"""Okabe and Ito's palette, and four of Tol's, which colour-blind readers can tell apart; one a model of `MODELS`."""
STYLES = ("-", "--", ":", "-.")
INCHES = 0.09
"""Width of a letter of a row's name, at most on average."""
LOG_FROM = 8
"""Ratio of largest to smallest value from which an axis is logarithmic."""


def plot_auroc(statistics: Statistics, vary: Mapping[str, Sequence[Any]], file: Path) -> None:
    """Mean AUROC: against the first numeric key if there is one, else one line of dots a cell and model.

    Args:
        statistics: what is drawn.
        vary: key -> values.
        file: SVG to write.
    """
    key = next((key for key, values in vary.items() if len(values) > 1 and all(map(_numeric, values))), None)
    if key is None:
        _dots(statistics.means, file)
    else:
        _lines(statistics.means, key, file)


def _numeric(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def plot_paired(statistics: Statistics, file: Path) -> None:
    """Differences of AUROC: a faint dot a site, a bold one for the mean.

    Args:
        statistics: what is drawn.
        file: SVG to write.
    """
    ours = [
        (f"{cell_name(entry.cell)}: federated - {model_name(entry.other_model)}", entry)
        for entry in statistics.against_models
    ]
    theirs = [
        (f"{model_name(entry.model)}: {cell_name(entry.cell)} - {cell_name(entry.other_cell)}", entry)
        for entry in statistics.against_first
    ]
    rows: list[tuple[str, Paired]] = [*ours, *theirs]
    names = [name for name, _ in rows]
    with figure_axes(file, rows=len(rows), names=names) as axes:
        axes.axvline(0, color="black", linewidth=0.8)
        for at, (_, entry) in enumerate(rows):
            colour = _colour(entry.other_model)
            axes.plot(list(entry.by_site.values()), [at] * len(entry.by_site), "o", color=colour, alpha=0.3)
            axes.plot([entry.mean], [at], "D", color=colour)
        _name_rows(axes, names)
        axes.set_xlabel("difference of AUROC (one faint dot a site, diamond: mean)")


def _dots(means: list[Mean], file: Path) -> None:
    names = [f"{cell_name(entry.cell)}: {model_name(entry.model)}" for entry in means]
    with figure_axes(file, rows=len(means), names=names) as axes:
        for at, entry in enumerate(means):
            seeds = list(entry.by_seed["auroc"].values())
            axes.plot(seeds, [at] * len(seeds), "o", color=_colour(entry.model), alpha=0.3)
            if seeds:
                axes.plot([entry.mean("auroc")], [at], "D", color=_colour(entry.model))
        _name_rows(axes, names)
        axes.set_xlabel("AUROC, mean over sites (one faint dot a seed, diamond: mean)")


def _name_rows(axes: Any, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(max(len(names), 1) - 0.5, -0.5)
    if not names:
        axes.text(0.5, 0.5, "nothing to compare", transform=axes.transAxes, ha="center")


def _lines(means: list[Mean], key: str, file: Path) -> None:
    curves = _curves(means, key)
    others = list(dict.fromkeys(rest for _, rest in curves))
    with figure_axes(file, rows=12) as axes:
        for (model, rest), entries in curves.items():
            label = f"{model_name(model)}, {rest}" if rest else model_name(model)
            _curve(axes, entries, key, label, STYLES[others.index(rest) % len(STYLES)])
        values = [entry.cell[key] for entry in means]
        if values and min(values) > 0 and max(values) / min(values) >= LOG_FROM:
            axes.set_xscale("log")
            axes.set_xticks(sorted(set(values)), [f"{value:g}" for value in sorted(set(values))], minor=False)
            axes.minorticks_off()
        axes.set_xlabel(key)
        axes.set_ylabel("AUROC, mean over sites (band: ± sd over seeds)")
        if curves:
            axes.legend(fontsize="small")


def _curves(means: list[Mean], key: str) -> dict[tuple[str, str], list[Mean]]:
    """(model, the other varied keys) -> its points; a model that the other keys leave alone has one curve."""
    curves: dict[tuple[str, str], list[Mean]] = {}
    for entry in means:
        rest = {name: value for name, value in entry.cell.items() if name != key}
        curves.setdefault((entry.model, cell_name(rest) if rest else ""), []).append(entry)
    result: dict[tuple[str, str], list[Mean]] = {}
    for model in dict.fromkeys(model for model, _ in curves):
        same = {name: entries for name, entries in curves.items() if name[0] == model}
        shapes = [[entry.by_seed for entry in entries] for entries in same.values()]
        alike = all(shape == shapes[0] for shape in shapes)
        result |= {(model, ""): next(iter(same.values()))} if alike else same
    return result


def _curve(axes: Any, entries: list[Mean], key: str, label: str, style: str) -> None:
    defined = sorted(
        (entry.cell[key], value, entry.sd("auroc") or 0.0)
        for entry in entries
        if (value := entry.mean("auroc")) is not None
    )
    x, y, spread = ([point[at] for point in defined] for at in range(3))
    colour = _colour(entries[0].model)
    axes.plot(x, y, style, marker="o", color=colour, label=label)
    low = [value - sd for value, sd in zip(y, spread, strict=True)]
    high = [value + sd for value, sd in zip(y, spread, strict=True)]
    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def _colour(model: str) -> str:
    return COLOURS[MODELS.index(model)]


@contextmanager
def figure_axes(file: Path, *, rows: int, names: Sequence[str] = ()) -> Iterator[Any]:
    """Axes of a figure that is written when the block ends: no date, no random ids, no display.

    Args:
        file: SVG to write.
        rows: for its height.
        names: of the rows, beside which the axes still need room.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "gapweave", "svg.fonttype": "none"}):
        width = max(8.0, 4.5 + INCHES * max(map(len, names), default=0))
        figure = Figure(figsize=(width, max(2.0, 0.3 * rows + 1)), layout="constrained")
        axes = figure.subplots()
        axes.grid(alpha=0.3)
        yield axes
        figure.savefig(file, format="svg", metadata={"Date": None})
