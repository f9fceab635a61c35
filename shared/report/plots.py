"""The plots of a run's report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from gapweave.shared.report.events import STATUSES, Span
from gapweave.shared.report.figure import (
    BLUE,
    GREEN,
    INK,
    LINE,
    ORANGE,
    PURPLE,
    QUIET,
    RED,
    TEAL,
    drawing,
    new_figure,
    spread,
    to_svg,
    whole_numbers,
)
from gapweave.shared.report.scores import Model

MARKERS = {
    "local": ("s", ORANGE),
    "pooled": ("D", PURPLE),
    "lr_local": ("^", TEAL),
    "lr_pooled": ("v", TEAL),
    "gbm_local": (">", QUIET),
    "gbm_pooled": ("<", QUIET),
    "federated": ("o", BLUE),
    "fine_tuned": ("*", BLUE),
}
COLOURS = {"ok": "#9fc5b0", "screened": ORANGE, "late": "#e6c65c", "failed": RED, "refused": "#4a5560", "left": QUIET}
HATCHES = {"screened": "////", "late": "....", "failed": "xxxx", "refused": ""}


def learning_curve(points: Sequence[Mapping[str, Any]], found: Mapping[str, Model]) -> Markup | None:
    """AUROC over rounds: the mean, each site, and the means of models that need no federation.

    Args:
        points: lines of curve.jsonl.
        found: the run's models.
    """
    sites = sorted({site for point in points for site in point["sites"]})
    lines = {site: _series(points, lambda point, site=site: point["sites"].get(site)) for site in sites}
    lines = {site: line for site, line in lines.items() if line[0]}
    if not lines:
        return None
    mean = _series(points, lambda point: point["mean"])
    with drawing("curve"):
        figure = new_figure(5.9, 3.7)
        axes = figure.add_subplot()
        for rounds, values in lines.values():
            axes.plot(rounds, values, color=BLUE, alpha=0.4, linewidth=0.9)
        axes.plot(*mean, color=BLUE, linewidth=2.4, label="federated, mean", marker="o", markersize=3)
        for key in ("local", "pooled"):
            value = found[key].mean.get("auroc") if key in found else None
            if value is not None:
                axes.axhline(value, color=MARKERS[key][1], linestyle=(0, (5, 3)), label=f"{found[key].label}, mean")
        axes.axhline(0.5, color=LINE, linewidth=1)
        axes.set(xlabel="round", ylabel="AUROC")
        whole_numbers(axes)
        axes.grid(axis="y")
        _label_ends(axes, {site: (rounds[-1], values[-1]) for site, (rounds, values) in lines.items()})
        figure.legend(loc="outside upper left", ncols=3)
        return to_svg(figure, "Line plot: AUROC on held-out patients over rounds, mean and each site.")


def _series(points: Sequence[Mapping[str, Any]], pick: Any) -> tuple[list[int], list[float]]:
    rounds, values = [], []
    for point in points:
        value = (pick(point) or {}).get("auroc")
        if value is not None:
            rounds.append(point["round"])
            values.append(value)
    return rounds, values


def _label_ends(axes: Any, ends: Mapping[str, tuple[float, float]]) -> None:
    """Names at the ends of lines, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    heights = spread([value for _, value in ends.values()], (high - low) / 22)
    for (site, (at, value)), height in zip(ends.items(), heights, strict=True):
        axes.annotate(
            _short(site),
            (at, value),
            (axes.get_xlim()[1], height),
            fontsize=7.5,
            color=QUIET,
            va="center",
            arrowprops={"arrowstyle": "-", "color": LINE, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 1},
        )


def _short(name: str, limit: int = 22) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"


def site_comparison(found: Mapping[str, Model], sites: Sequence[str]) -> Markup | None:
    """AUROC of all models, a line a site; the bar runs from local-only to federated."""
    shown = [site for site in sites if any(model.auroc(site) is not None for model in found.values())]
    if not shown:
        return None
    with drawing("sites"):
        figure = new_figure(5.9, max(3.7, 1.3 + 0.3 * len(shown)))
        axes = figure.add_subplot()
        for row, site in enumerate(shown):
            _gain(axes, row, found["federated"].auroc(site), found["local"].auroc(site) if "local" in found else None)
        for key, model in found.items():
            marker, colour = MARKERS.get(key, ("P", INK))
            placed = [(value, row) for row, site in enumerate(shown) if (value := model.auroc(site)) is not None]
            size = 64 if key in ("federated", "fine_tuned") else 30
            hollow = key.endswith("_pooled") or key == "pooled"
            face = {"facecolors": "white", "edgecolors": colour} if hollow else {"color": colour}
            if placed:
                axes.scatter(
                    *zip(*placed, strict=True),
                    s=size,
                    marker=marker,
                    label=model.label,
                    zorder=3,
                    linewidths=1.2,
                    **face,
                )
        axes.set_yticks(range(len(shown)), [_short(site) for site in shown], color=INK)
        axes.invert_yaxis()
        axes.set_xlabel("AUROC on held-out patients")
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
        axes.margins(y=0.08)
        figure.legend(loc="outside upper left", ncols=3, handletextpad=0.2, columnspacing=1.2)
        return to_svg(figure, "Dot plot: AUROC of each model at each site; the main table has the numbers.")


def _gain(axes: Any, row: int, federated: float | None, local: float | None) -> None:
    if federated is not None and local is not None:
        colour = GREEN if federated >= local else RED
        axes.plot([local, federated], [row, row], color=colour, alpha=0.45, linewidth=4, solid_capstyle="butt")


def update_norms(values: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]) -> Markup | None:
    """Norms of the updates over rounds: a small panel a group, a line a site."""
    if not values:
        return None
    columns = min(5, len(values))
    rows = math.ceil(len(values) / columns)
    with drawing("norms"):
        figure = new_figure(12.0, 0.35 + 1.25 * rows)
        for at, (group, sites) in enumerate(values.items(), start=1):
            axes = figure.add_subplot(rows, columns, at)
            for pairs in sites.values():
                axes.plot(*zip(*pairs, strict=True), color=BLUE, alpha=0.55, linewidth=0.9)
            axes.set_title(_short(group, 30), fontsize=8.5, loc="left", color=INK)
            axes.set_ylim(bottom=0)
            axes.tick_params(labelsize=7)
            axes.locator_params(axis="y", nbins=3)
            whole_numbers(axes)
        return to_svg(figure, "Small line plots: L2 norm of each site's update over rounds, one panel a group.")


def participation(found: Sequence[Span], sites: Sequence[str], rounds: int) -> Markup | None:
    """A strip a site: what it was in each round."""
    if not found or not rounds:
        return None
    with drawing("participation"):
        figure = new_figure(12.0, 0.75 + 0.24 * max(len(sites), 2))
        axes = figure.add_subplot()
        for span in found:
            axes.barh(
                sites.index(span.site),
                span.last - span.first + 1,
                left=span.first - 0.5,
                height=0.72,
                color=COLOURS[span.status],
                hatch=HATCHES.get(span.status, ""),
                edgecolor="white",
                linewidth=0,
            )
        _separate(axes, rounds)
        axes.set_yticks(range(len(sites)), [_short(site) for site in sites], color=INK)
        axes.set(xlim=(0.5, rounds + 0.5), ylim=(len(sites) - 0.5, -0.5), xlabel="round")
        whole_numbers(axes)
        axes.tick_params(axis="y", length=0)
        axes.spines[:].set_visible(False)
        _legend(figure, {span.status for span in found})
        return to_svg(
            figure, "Strip a site: ok, screened, late, failed or refused in each round; events are listed below."
        )


def _separate(axes: Any, rounds: int) -> None:
    """White lines between rounds, as long as they can be told apart."""
    if rounds <= 60:
        for at in range(1, rounds):
            axes.axvline(at + 0.5, color="white", linewidth=1.2)


def _legend(figure: Any, seen: set[str]) -> None:
    from matplotlib.patches import Patch

    patches = [
        Patch(facecolor=COLOURS[status], hatch=HATCHES.get(status, ""), edgecolor="white", linewidth=0, label=status)
        for status in STATUSES
        if status in seen
    ]
    figure.legend(handles=patches, loc="outside upper left", ncols=len(patches))
