"""Privacy events: what one release did, in the terms from which its cost follows.

Serialised events never change meaning; only optional fields may be added. The neighbouring relation is always
adding or removing all records of one patient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

from gapweave.shared.errors import GapweaveError

Kind = Literal["dp_sgd", "noisy_count", "unnoised", "count_table", "noisy_statistic", "noisy_max"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""All kinds that this version can account for."""
PURE: frozenset[Kind] = frozenset({"noisy_count", "count_table", "noisy_max"})
"""Kinds whose cost is a pure epsilon a step, 1 / noise_multiplier; sampling is not credited."""

SCORES: Final = "scores of the test patients"
LOOK: Final = f"{SCORES} after round"
"""What tables of scores are called in `released`; a look's name ends with the number of its round."""


@dataclass(frozen=True, kw_only=True)
class PrivacyEvent:
    """One release.

    Attributes:
        kind: `dp_sgd`: `steps` Poisson-sampled Gaussian mechanisms; `noisy_count`: a count with discrete
            Laplace noise; `unnoised`: a release without noise, whose epsilon is infinite; `count_table`: `steps`
            tables of counts in each of which one patient changes one cell by 1, all cells with discrete Laplace
            noise; `noisy_statistic`: `steps` vectors over all patients with Gaussian noise; `noisy_max`: `steps`
            choices of the largest of several scores with Gumbel noise, where one patient moves all scores in one
            direction and by at most 1.
        released: what left, in words ("update of round 3").
        noise_multiplier: sd of the noise over `max_grad_norm` (dp_sgd, noisy_statistic), or the scale of the
            Laplace or Gumbel noise (noisy_count, count_table, noisy_max); 0 for unnoised.
        sample_rate: probability with which a patient enters a step; 1 for all kinds but dp_sgd.
        steps: number of noised steps.
        max_grad_norm: clipping bound, or the L2 sensitivity of a statistic; 1, the sensitivity of a count.
        n_hat: public number of training patients that denominators use; None before it is known.
        unit: what is protected.
        neighbours: the neighbouring relation.
    """

    kind: Kind
    released: str
    noise_multiplier: float
    sample_rate: float = 1.0
    steps: int = 1
    max_grad_norm: float = 1.0
    n_hat: int | None = None
    unit: Literal["patient"] = "patient"
    neighbours: Literal["add_remove"] = "add_remove"

    def to_dict(self) -> dict[str, Any]:
        """As stored in a ledger."""
        return dict(vars(self))  # all fields are plain; `asdict` copies each in depth, and ledgers ask often

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> PrivacyEvent:
        """Read a stored event.

        Raises:
            GapweaveError: for an event of a kind, unit or relation that this version does not know.
        """
        known = {"kind": KINDS, "unit": ("patient",), "neighbours": ("add_remove",)}
        strange = [f"{key} {content.get(key)!r}" for key, values in known.items() if content.get(key) not in values]
        if strange:
            raise GapweaveError(
                f"an event of {strange[0]} cannot be accounted for",
                where="ledger",
                remedy="Use the Gapweave version that wrote it",
            )
        fields = {name: content[name] for name in cls.__dataclass_fields__ if name in content}
        return cls(**fields)
