"""What the guarantee is, in sentences and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

COVERED = (
    "Whoever sees everything that a site ever released learns almost the same whether any one patient's records were "
    "in its data or not: epsilon bounds how much more likely any outcome can become (a factor of at most e^epsilon), "
    "but for a probability of about delta. This holds for all records of the patient together, whatever else an "
    "attacker knows and whatever is computed later from what was released. It adds up over all rounds, runs and "
    "studies of the site in one ledger, and the site stops at its cap."
)
NOT_COVERED = (
    "what stays inside the site: data, private models, and results that only its own staff look at",
    "that the site exists and takes part, and what it declares in public: its modalities, classes, vocabulary, record "
    "cap and minimum number of patients",
    "when replies arrive, beyond the fixed reply times",
    "a person's decision to join or to leave, and settings that somebody chose after looking at un-noised results",
    "a patient treated at several of the sites: the epsilons of these sites add up for this patient",
    "exchanging one patient for another, which counts as two changes, and costs about twice the epsilon",
    "facts about a disease or a group of patients that the model learns: to find them is its purpose",
)


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


def site_budgets(summary: Mapping[str, Any]) -> list[Budget]:
    """The privacy table."""
    return [
        Budget(site=site, privacy=row["privacy"], releases=tuple((row["privacy"] or {}).get("releases", ())))
        for site, row in summary["sites"].items()
    ]


def release_words(release: Mapping[str, Any]) -> str:
    """What a folded release was, in words."""
    count = release["releases"]
    if release["kind"] == "noisy_count":
        return "a number of patients, noised" if count == 1 else f"{count} numbers of patients, noised"
    what = "1 update of model parameters" if count == 1 else f"{count} updates of model parameters"
    return f"{what}, {'noised' if release['kind'] == 'dp_sgd' else 'WITHOUT NOISE'}"


def guarantee_sentence(summary: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether there is a guarantee, and what it is, in one plain sentence."""
    ledgers = [row["privacy"] for row in summary["sites"].values() if row["privacy"]]
    if summary.get("guarantee") == "none":
        return False, "None: nothing in this run was noised, so no patient is protected by it."
    if not ledgers:
        return False, "None can be stated: no site reported what its ledger says."
    if any(ledger["epsilon"] is None for ledger in ledgers):
        return False, "None at every site: at least one of the ledgers holds a release without noise."
    epsilon = max(ledger["epsilon"] for ledger in ledgers)
    delta = max(ledger["delta"] for ledger in ledgers)
    return True, (
        f"Each patient of each site is protected with epsilon at most {epsilon:.2f} (delta {delta:g}), "
        "over everything that the site's ledger records."
    )
