"""The report of a site's ledger in words, for a screen."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from gapweave.shared.privacy.ledger import OpenRun
from gapweave.shared.report.guarantee import NOT_COVERED, PRECISION, meaning
from gapweave.shared.report.ledger_report import UNKNOWN_PARAMETERS, LedgerFacts
from gapweave.shared.report.ledger_studies import Release, StudyCost
from gapweave.shared.report.wording import budget, left_figure, short

WIDTH = 100

CHAIN = {
    True: "intact, and confirmed by a copy of its head that is kept elsewhere",
    False: "NOT INTACT: a copy of its head that is kept elsewhere shows entries which are missing here",
    "unanchored": (
        "unanchored: every entry follows from the one before, but no copy of the ledger's head is kept elsewhere, "
        "so a ledger whose last entries were removed, or an older copy of it, would look the same; name a place for "
        "the copy as policy.anchor in the site file"
    ),
}
"""What `intact` means."""

NOTHING_SHOWN = "What was released is not known: an earlier ledger was lost, and this one shows nothing yet."

FIGURES = {
    "renyi": "whoever planned which study after seeing what",
    "fixed": "exactly, for the whole schedule of the first study, beside which nothing else fits under this cap",
}
"""What keeps the cap (docs/decisions/0005)."""

LAW = {
    "dp_sgd": "Gaussian",
    "noisy_statistic": "Gaussian",
    "noisy_count": "discrete Laplace",
    "count_table": "discrete Laplace",
    "noisy_max": "Gumbel",
    "unnoised": "none",
}
"""The noise of each kind of event."""


def chain_words(summary: dict[str, Any]) -> str:
    """What is known of the chain, and of what it lacks."""
    lacks = "; earlier entries are missing, whose loss was declared" if summary["recovered"] else ""
    return CHAIN[summary["intact"]] + lacks


def spent_words(summary: dict[str, Any]) -> str:
    """What was spent, in words: the figure that the cap binds, and the exact one."""
    if summary["epsilon"] is None:
        return "no guarantee: something was released without noise"
    figure = FIGURES[summary["figure"]]
    return (
        f"epsilon {budget(summary['epsilon_filter'])} of a cap of {short(summary['cap'])}, {figure}; "
        f"epsilon {budget(summary['epsilon'])} for schedules fixed in advance; "
        f"delta {short(summary['delta'])}"
    )


def left_words(facts: LedgerFacts) -> str:
    """What the cap has room for."""
    if facts.left is None:
        return "no private study: something was released without noise"
    if facts.summary["intact"] is False:
        return "nothing: the site refuses to work until its ledger is restored, or its loss declared"
    if not facts.left:
        return "no further study fits"
    return f"a further study of epsilon up to {left_figure(facts.left)} fits"


def open_words(run: OpenRun) -> str:
    """What a run holds of the budget."""
    held = f"{run.run} since {run.since}, {run.left} of {run.planned} releases left"
    if not run.returns:
        return f"{held}; they do not come back: what was granted exactly is for the whole schedule"
    return f"{held}; `gapweave site budget --close` gives them back"


def not_covered(facts: LedgerFacts) -> list[str]:
    """What the guarantee does not cover at this site."""
    items = [precision_words(facts) if item is PRECISION else item for item in NOT_COVERED]
    return [*items, lost_words(facts)] if facts.recovered else items


def precision_words(facts: LedgerFacts) -> str:
    """What finite precision adds, in words."""
    added = facts.precision
    told = f", with {UNKNOWN_PARAMETERS:,} trained numbers where the ledger names none" if added.assumed else ""
    return (
        f"the finite precision of the noise, which adds at most {short(added.epsilon)} to epsilon and "
        f"{short(added.delta)} to delta{told}"
    )


def lost_words(facts: LedgerFacts) -> str:
    """What lost entries were assumed to cost."""
    return (
        f"entries of this ledger were lost: the site's operator assumed that they cost epsilon {budget(facts.lost)}, "
        "which is part of all totals; if they cost more, so does everything"
    )


def ledger_lines(facts: LedgerFacts) -> Iterator[str]:
    """The report as lines of text."""
    yield from _head(facts)
    yield ""
    for study in facts.studies:
        yield from _study(study)
    if not facts.studies:
        yield NOTHING_SHOWN if facts.recovered else "Nothing was released."
    yield ""
    yield from _wrapped(f"What it means: {meaning(facts.summary['epsilon_filter'])}", "")
    yield ""
    yield "What it does not cover:"
    for item in not_covered(facts):
        yield from _wrapped(f"  - {item}", "    ")
    yield ""
    yield f"Audit of the code that trains: {audit_words(facts)}"


def audit_words(facts: LedgerFacts) -> str:
    """The result of an audit in a few words."""
    if facts.audit is None:
        return "no result was given to this report"
    failed = ", ".join(part.part for part in facts.audit.parts if not part.passed)
    verdict = "passed" if facts.audit.passed else f"FAILED ({failed or 'it says so'})"
    return f"{verdict}, with study {facts.audit.study!r}" if facts.audit.study else verdict


def _head(facts: LedgerFacts) -> Iterator[str]:
    summary, indent = facts.summary, " " * 13
    yield f"Site {summary['site']}, cohort {summary['cohort'] or 'without a name'}"
    yield "  protected  each patient, with all records"
    yield from _wrapped(f"  spent      {spent_words(summary)}", indent)
    yield from _wrapped(f"  left       {left_words(facts)}", indent)
    if facts.left is not None:
        planned = (
            f"epsilon {budget(facts.reserved_filter)}, {budget(facts.reserved)} for schedules fixed in advance, once "
            "open runs have used all that they reserved"
        )
        yield from _wrapped(f"  planned    {planned}", indent)
    for run in facts.open_runs:
        yield from _wrapped(f"  open       {open_words(run)}", indent)
    yield from _wrapped(f"  ledger     {facts.entries} entries; {chain_words(summary)}", indent)
    if facts.recovered:
        yield from _wrapped(f"  lost       {lost_words(facts)}", indent)


def _study(study: StudyCost) -> Iterator[str]:
    days = study.first if study.first == study.last else f"{study.first} to {study.last}"
    runs = "1 run" if study.runs == 1 else f"{study.runs} runs"
    cost = "no guarantee" if study.epsilon is None else f"epsilon {budget(study.epsilon)} alone"
    yield f"Study {study.name or 'without approval'} ({study.study[:12]}), {runs}, {days}: {cost}"
    for release in study.releases:
        yield from _wrapped(f"  - {release_line(release)}", "    ")
    if study.setting is not None:
        yield from _wrapped(f"  left the site: {groups_words(study.setting.shared)}", "    ")
        yield from _wrapped(f"  trained and stayed: {groups_words(study.setting.kept)}", "    ")


def groups_words(groups: tuple[str, ...]) -> str:
    """Parameter groups by name."""
    return ", ".join(groups) or "none"


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False)


def release_line(release: Release) -> str:
    """One kind of release with everything that its cost follows from."""
    times = "once" if release.times == 1 else f"{release.times} times"
    if not release.noised:
        return f"{release.what}, {times}, WITHOUT NOISE"
    if release.kind != "dp_sgd":
        return f"{release.what}, {times}: {LAW[release.kind]} noise of scale {short(release.noise_multiplier)}"
    size = f", for {release.n_hat} patients (noised or declared number)" if release.n_hat is not None else ""
    return (
        f"{release.what}, {times}: {release.steps} steps, sigma {short(release.noise_multiplier)}, "
        f"q {short(release.sample_rate)}, clip {short(release.max_grad_norm)}{size}"
    )
