"""What a site tells the server of itself and of its plan, before the first round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gapweave.shared.privacy.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Capability:
    """What a site tells the server before the first round; all of it declared or noised.

    Attributes:
        site: its name.
        modalities: that it holds.
        groups: parameter groups that it will send.
        rounds: rounds that its cap allows.
        plan: as `stated` gives it.
        ledger: where its ledger stands, for the server to remember.
    """

    site: str
    modalities: list[str]
    groups: list[str]
    rounds: int
    plan: dict[str, Any]
    ledger: dict[str, Any]


def stated(plan: Plan) -> dict[str, Any]:
    """Noise, sampling rate and n_hat of the training, what was released before it, and which tables of scores will be.

    Args:
        plan: of the site.

    Returns:
        What JSON holds; `no_table` and `no_looks` say why there are none, on the way or at the end.
    """
    return {
        "noise_multiplier": plan.noise_multiplier,
        "sample_rate": plan.sample_rate,
        "n_hat": plan.n_hat,
        "epsilon": plan.epsilon,
        "delta": plan.delta,
        "preparation": [event.to_dict() for event in plan.preparation],
        "table": None if plan.table is None else plan.table.to_dict(),
        "no_table": plan.no_table,
        "looks": [event.to_dict() for event in plan.looks],
        "no_looks": plan.no_looks,
    }
