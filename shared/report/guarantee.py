"""What the guarantee is, in sentences and numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gapweave.shared.report.wording import rounded_up, short

COVERED = (
    "Whoever sees everything that a site ever released learns almost the same whether any one patient's records were "
    "in its data or not: epsilon bounds how much more likely any outcome can become, by a factor of at most "
    "e to the power of epsilon{factor}, but for a probability of about delta. This holds for all records of the "
    "patient together, whatever else an attacker knows and whatever is computed later from what was released. It adds "
    "up over all rounds, runs and studies of the site in one ledger, and the site stops at its cap."
)
PRECISION = "the finite precision of the noise, which adds a little; a site's privacy report says how much"
NOT_COVERED = (
    "a patient treated at several of the sites: the epsilons of these sites add up for this patient",
    "exchanging one patient for another, which counts as two changes, and costs about twice the epsilon",
    "that the site exists and takes part, and what it declares in public: its modalities, classes, vocabulary, record "
    "cap, minimum number of patients, and its number of patients where that was not counted with noise",
    "what stays inside the site: data, private models, and results that only its own staff look at",
    "when replies arrive, beyond the fixed reply times",
    "that the site refuses or fails, and which of a few fixed texts says why: that it has fewer patients than its "
    "minimum, or that its labels or values cannot be used, is told without noise",
    "a person's decision to join or to leave, and settings that somebody chose after looking at un-noised results",
    "studies that were chosen after seeing an earlier one's results, in the exact figure: it holds for schedules fixed "
    "in advance. The figure that the cap binds holds in any case",
    PRECISION,
    "facts about a disease or a group of patients that the model learns: to find them is its purpose",
)
NOT_COVERED_SHORT = (
    "a patient treated at several sites: the epsilons of these sites add up",
    "exchanging one patient for another: about twice the epsilon",
    "what the site declares: modalities, classes, record cap",
    "what stays inside the site; timing; who joins or leaves",
    "what the model learns about a disease or a group of patients",
)
"""The same for a first look."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """One site's row of the privacy table.

    Attributes:
        site: its name.
        privacy: of the summary, or None where the site has no ledger.
        releases: folded, each in words and numbers.
    """

    site: str
    privacy: Mapping[str, Any] | None
    releases: tuple[Mapping[str, Any], ...]


def meaning(epsilon: float | None) -> str:
    """What the guarantee means, for a board.

    Args:
        epsilon: to put a number on it; None for none.
    """
    if epsilon is None:
        return "Nothing: a release without noise protects no patient, and what was noised beside it cannot mend that."
    factor = math.exp(min(epsilon, 700.0))
    return COVERED.format(factor=f" ({factor:,.2g} here)" if factor < 10 or factor >= 1e6 else f" ({factor:,.0f} here)")


def site_budgets(summary: Mapping[str, Any]) -> list[Budget]:
    """The privacy table."""
    return [
        Budget(site=site, privacy=row["privacy"], releases=tuple((row["privacy"] or {}).get("releases", ())))
        for site, row in summary["sites"].items()
    ]


LEDGER = "over everything that the site's ledger records"
OVER = {"deployed": "over what this run released; a site's own ledger says what other runs and studies cost"}
"""What an epsilon of a summary is over: a server sees its own run only."""

KIND_WORDS = {
    "dp_sgd": "training with noise",
    "noisy_count": "number of patients with noise",
    "count_table": "tables of counts with noise",
    "noisy_statistic": "means and spreads with noise",
    "noisy_max": "choice of the largest score with noise",
    "unnoised": "release WITHOUT NOISE",
}
"""What each kind of event is called; a kind that is not here is named as the ledger names it."""


def release_words(release: Mapping[str, Any]) -> str:
    """What a folded release was, in words."""
    count, kind = release["releases"], release["kind"]
    return f"{KIND_WORDS.get(kind, f'release of the kind {kind}')}, {'once' if count == 1 else f'{count} times'}"


def worst_epsilon(summary: Mapping[str, Any]) -> float | None:
    """The largest epsilon of all ledgers; None when there is none, or one of them holds an un-noised release."""
    spent = [row["privacy"]["epsilon"] for row in summary["sites"].values() if row["privacy"]]
    return None if not spent or None in spent else float(max(spent))


def guarantee_sentence(summary: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether there is a guarantee, and what it is, in one plain sentence."""
    ledgers = [row["privacy"] for row in summary["sites"].values() if row["privacy"]]
    if summary.get("guarantee") == "none":
        return False, "None: nothing in this run was noised, so no patient is protected by it."
    if not ledgers:
        return False, "None can be stated: no site reported what its ledger says."
    epsilon = worst_epsilon(summary)
    if epsilon is None:
        return False, "None at every site: at least one of the ledgers holds a release without noise."
    delta = max(ledger["delta"] for ledger in ledgers)
    filtered = [ledger["epsilon_filter"] for ledger in ledgers if ledger.get("epsilon_filter") is not None]
    adaptive = (
        f", or {rounded_up(max(filtered)):.2f} if studies were planned after seeing others' results" if filtered else ""
    )
    return True, (
        f"Each patient of each site is protected with epsilon at most {rounded_up(epsilon):.2f}{adaptive} "
        f"(delta {short(delta)}), {OVER.get(str(summary.get('engine')), LEDGER)}."
    )
