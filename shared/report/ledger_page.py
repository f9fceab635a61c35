"""The report of a site's ledger as a page for an ethics board: what matters fits a first screen of 1280 by 800."""

from __future__ import annotations

from typing import NamedTuple

from markupsafe import Markup

from gapweave.shared.report.guarantee import NOT_COVERED_SHORT, meaning
from gapweave.shared.report.ledger_report import LedgerFacts
from gapweave.shared.report.ledger_studies import COUNT, WORDS, Release, StudyCost
from gapweave.shared.report.ledger_text import LAW, chain_words, lost_words, not_covered, precision_words
from gapweave.shared.report.wording import NOTHING, left_figure, size

STANDING = {True: ("good", "✓ intact, anchored"), False: ("bad", "✗ NOT INTACT"), "unanchored": ("", "○ unanchored")}
"""Class and words of the badge."""

NAMED = 12
"""At most so many groups of parameters are named in a box."""


class Sent(NamedTuple):
    """Releases of one meaning, of all studies, that left the site."""

    what: str
    times: int
    bytes: str
    noised: bool


class Groups(NamedTuple):
    """Groups of parameters by name."""

    left: list[str]
    stayed: list[str]


class Bar(NamedTuple):
    """Lengths of the bar of the spent budget, in per cent of its width."""

    exact: float
    bound: float
    planned: float
    cap: float


def ledger_page(facts: LedgerFacts) -> str:
    """The report as a self-contained page."""
    from gapweave.shared.report.render import render

    summary = facts.summary
    return render(
        "ledger.html",
        facts=facts,
        summary=summary,
        standing=STANDING[summary["intact"]],
        chain=chain_words(summary),
        who=who(facts),
        sent=sent(facts),
        groups=groups(facts),
        named=named,
        left=None if facts.left is None else left_figure(facts.left),
        bar=bar(facts),
        law=LAW,
        meaning=meaning(summary["epsilon_filter"]),
        in_short=(*NOT_COVERED_SHORT, *((lost_words(facts),) if facts.recovered else ())),
        precision=precision_words(facts),
        not_covered=not_covered(facts),
        curve_plot=_curve_plot(facts),
    )


def who(facts: LedgerFacts) -> list[str]:
    """The site in a few facts: modalities, patients, studies."""
    settings = [study.setting for study in facts.studies if study.setting is not None]
    held = dict.fromkeys(name for setting in settings for name in setting.modalities)
    studies = "1 study" if len(facts.studies) == 1 else f"{len(facts.studies)} studies"
    parts = [f"Cohort {facts.summary['cohort'] or 'without a name'}", _patients(facts)]
    parts += [f"holds {', '.join(held)}" if held else "", studies, f"last entry {facts.written[:10]}"]
    return [part for part in parts if part]


def _patients(facts: LedgerFacts) -> str:
    """The newest public number of training patients."""
    for study in reversed(facts.studies):
        numbers = [release.n_hat for release in study.releases if release.n_hat is not None]
        if numbers:
            return f"{numbers[-1]} training patients ({_source(study)})"
    return ""


def _source(study: StudyCost) -> str:
    """Where a study's number of patients comes from."""
    if any(release.what == WORDS[COUNT] for release in study.releases):
        return "counted with noise"
    return "declared number" if all(release.noised for release in study.releases) else "number without noise"


def sent(facts: LedgerFacts) -> list[Sent]:
    """What left the site, over all studies."""
    alike: dict[tuple[str, bool], list[Release]] = {}
    for study in facts.studies:
        for release in study.releases:
            if release.sent:
                alike.setdefault((release.what, release.noised), []).append(release)
    return [
        Sent(what=what, times=sum(release.sent for release in members), bytes=bytes_words(members), noised=noised)
        for (what, noised), members in alike.items()
    ]


def bytes_words(releases: list[Release]) -> str:
    """Bytes of releases together; a dash where the ledger does not say."""
    sizes = [release.bytes for release in releases]
    known = [one for one in sizes if one is not None]
    return size(sum(known)) if len(known) == len(sizes) else NOTHING


def groups(facts: LedgerFacts) -> Groups:
    """Groups of parameters that left in any study, and those that were trained and never left."""
    settings = [study.setting for study in facts.studies if study.setting is not None]
    left = list(dict.fromkeys(group for setting in settings for group in setting.shared))
    kept = dict.fromkeys(group for setting in settings for group in setting.kept)
    return Groups(left=left, stayed=[group for group in kept if group not in left])


def named(names: list[str]) -> str:
    """Names, as long as they fit a box; all of them stand in a table further down."""
    return ", ".join(names) or "none" if len(names) <= NAMED else f"{len(names)} parts, named below"


def bar(facts: LedgerFacts) -> Bar | None:
    """The bar of the spent budget; none after a release without noise."""
    summary, planned = facts.summary, facts.reserved_filter
    if planned is None:
        return None
    full = max(summary["cap"], planned)
    lengths = (summary["epsilon"], summary["epsilon_filter"], planned, summary["cap"])
    return Bar(*(round(100 * length / full, 2) for length in lengths))


def _curve_plot(facts: LedgerFacts) -> Markup | None:
    """Cumulative epsilon over charges, below the cap."""
    from gapweave.shared.report.figure import BLUE, ORANGE, RED, drawing, new_figure, to_svg, whole_numbers

    if len(facts.curve) < 2:
        return None
    with drawing("budget"):
        figure = new_figure(12.0, 3.2)
        axes = figure.add_subplot()
        lines = [
            (facts.curve_filter, {"color": BLUE, "marker": "o", "label": "counts against the cap"}),
            (facts.curve, {"color": ORANGE, "marker": "s", "label": "for schedules fixed in advance"}),
        ]
        for points, look in lines:
            axes.plot(*zip(*points, strict=True), drawstyle="steps-post", linewidth=2, markersize=3, **look)
        axes.axhline(facts.summary["cap"], color=RED, linestyle=(0, (5, 3)), label="cap")
        axes.set(xlabel="charges: rounds, counts and tables, in order", ylabel="epsilon")
        axes.set_xlim(left=0)
        whole_numbers(axes)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        figure.legend(loc="outside upper left", ncols=3)
        return to_svg(
            figure, "Line plot: cumulative epsilon over the charges of the ledger, by both figures, and the cap."
        )
