"""From matplotlib to SVG that can stand inside a page: no dates, no references to outside, equal for equal input."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from markupsafe import Markup, escape

INK, QUIET, LINE = "#1c2733", "#66727f", "#d5dbe1"
BLUE, GREEN, RED, ORANGE, PURPLE, TEAL = "#1f5f99", "#2b7a4b", "#b3402f", "#c77d1a", "#6b4c9a", "#20818c"

STYLE = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": LINE,
    "axes.labelcolor": QUIET,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "grid.color": "#eaedf0",
    "grid.linewidth": 0.8,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


@contextmanager
def drawing(name: str) -> Iterator[None]:
    """Matplotlib settings for one figure; `name` keeps the ids of several figures in a page apart."""
    import matplotlib

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": f"gapweave {name}"}), warnings.catch_warnings():
        # A name in a script that matplotlib's own font lacks is drawn by the browser's font.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        yield


def new_figure(width: float, height: float) -> Any:
    """An empty figure in inches; a page scales it to its column."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def whole_numbers(axes: Any) -> None:
    """Mark whole numbers only on the x axis: rounds, charges."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def to_svg(figure: Any, description: str) -> Markup:
    """The figure as an `<svg>` element.

    Args:
        figure: a matplotlib figure.
        description: said to those who cannot see it.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=metadata, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg ") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", text, count=1)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda found: found.group(0) if found.group(1) in used else "", text)
    return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{escape(description)}" ', 1))


def spread(positions: list[float], gap: float) -> list[float]:
    """Move labels apart until neighbours are at least `gap` from each other, keeping their order.

    >>> spread([0.0, 0.0, 5.0], 1.0)
    [-0.5, 0.5, 5.0]
    """
    order = sorted(range(len(positions)), key=lambda at: positions[at])
    blocks: list[tuple[float, list[int]]] = []
    for at in order:
        blocks.append((positions[at], [at]))
        while len(blocks) > 1 and blocks[-1][0] - blocks[-2][0] < gap * (len(blocks[-1][1]) + len(blocks[-2][1])) / 2:
            members = blocks[-2][1] + blocks[-1][1]
            blocks[-2:] = [(sum(positions[member] for member in members) / len(members), members)]
    result = list(positions)
    for center, members in blocks:
        for at, member in enumerate(members):
            result[member] = center + gap * (at - (len(members) - 1) / 2)
    return result
