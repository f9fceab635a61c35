"""The report of a site's ledger, for a screen and as a page."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from markupsafe import Markup

from gapweave.shared.report.guarantee import NOT_COVERED, meaning
from gapweave.shared.report.ledger_report import LedgerFacts, Release
from gapweave.shared.report.wording import budget, short

WIDTH = 100

CHAIN = {
    True: "intact, and confirmed by a copy of its head that is kept elsewhere",
    False: "NOT INTACT",
    "unanchored": (
        "unanchored: every entry follows from the one before, but no copy of the ledger's head is kept elsewhere, "
        "so a ledger whose last entries were removed, or an older copy of it, would look the same"
    ),
}
"""What `intact` means."""


def spent_words(summary: dict[str, Any]) -> str:
    """What was spent, in words."""
    if summary["epsilon"] is None:
        return "no guarantee: something was released without noise"
    return (
        f"epsilon {budget(summary['epsilon'])} at delta {short(summary['delta'])}, of a cap of {short(summary['cap'])}"
    )


def ledger_lines(facts: LedgerFacts) -> Iterator[str]:
    """The report as lines of text."""
    summary = facts.summary
    yield f"Site {summary['site']}, cohort {summary['cohort'] or 'without a name'}"
    yield "  protected  each patient, with all records"
    yield f"  spent      {spent_words(summary)}"
    if facts.left is not None:
        yield f"  left       {budget(facts.left)}"
        yield f"  reserved   {budget(facts.reserved)} once everything is used that open runs have reserved"
    yield from _wrapped(f"  ledger     {facts.entries} entries; {CHAIN[summary['intact']]}", "             ")
    yield ""
    for study in facts.studies:
        days = study.first if study.first == study.last else f"{study.first} to {study.last}"
        runs = "1 run" if study.runs == 1 else f"{study.runs} runs"
        yield f"Study {study.name or 'without approval'} ({study.study[:12]}), {runs}, {days}: {_alone(study.epsilon)}"
        for release in study.releases:
            yield from _wrapped(f"  - {release_line(release)}", "    ")
    if not facts.studies:
        yield "Nothing was released."
    yield ""
    yield from _wrapped(f"What it means: {meaning(summary['epsilon'])}", "")
    yield ""
    yield "What it does not cover:"
    for item in NOT_COVERED:
        yield from _wrapped(f"  - {item}", "    ")


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False)


def _alone(value: float | None) -> str:
    return "no guarantee" if value is None else f"epsilon {value:.2f}"


def release_line(release: Release) -> str:
    """One kind of release with everything that its cost follows from."""
    times = "once" if release.times == 1 else f"{release.times} times"
    if not release.noised:
        return f"{release.what}, {times}, WITHOUT NOISE"
    if release.sample_rate >= 1 and release.n_hat is None:
        return f"{release.what}, {times}: discrete Laplace noise of scale {short(release.noise_multiplier)}"
    size = f", for {release.n_hat} patients (noised or declared number)" if release.n_hat is not None else ""
    return (
        f"{release.what}, {times}: {release.steps} steps, sigma {short(release.noise_multiplier)}, "
        f"q {short(release.sample_rate)}, clip {short(release.max_grad_norm)}{size}"
    )


def ledger_page(facts: LedgerFacts) -> str:
    """The report as a self-contained page."""
    from gapweave.shared.report.render import render

    return render(
        "ledger.html",
        facts=facts,
        summary=facts.summary,
        chain=CHAIN[facts.summary["intact"]],
        meaning=meaning(facts.summary["epsilon"]),
        spent=spent_words(facts.summary),
        curve_plot=_curve_plot(facts),
    )


def _curve_plot(facts: LedgerFacts) -> Markup | None:
    """Cumulative epsilon over charges, below the cap."""
    from gapweave.shared.report.figure import BLUE, RED, drawing, new_figure, to_svg, whole_numbers

    if len(facts.curve) < 2:
        return None
    with drawing("budget"):
        figure = new_figure(12.0, 3.2)
        axes = figure.add_subplot()
        axes.plot(*zip(*facts.curve, strict=True), color=BLUE, linewidth=2, marker="o", markersize=3, label="spent")
        axes.axhline(facts.summary["cap"], color=RED, linestyle=(0, (5, 3)), label="cap")
        axes.set(xlabel="charges", ylabel="epsilon")
        axes.set_xlim(left=0)
        whole_numbers(axes)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        figure.legend(loc="outside upper left", ncols=2)
        return to_svg(figure, "Line plot: cumulative epsilon over the charges of the ledger, and the cap.")
