"""How large a further study a site's cap has room for."""

from __future__ import annotations

import math

from gapweave.shared.privacy.accountant import epsilon
from gapweave.shared.privacy.events import PrivacyEvent
from gapweave.shared.privacy.ledger import LedgerView

FAINT = 1e9
"""Noise so large that a release with it costs nothing, but for what the filter's conversion to epsilon costs."""


def further_epsilon(view: LedgerView) -> float | None:
    """The largest epsilon of one further study beside everything that is spent and reserved.

    The filter starts at the constant of its conversion to epsilon, which is paid once: the cap less what is spent
    says nothing of what is left. A further study is taken as one full-batch Gaussian release, which costs
    order / (2 sigma^2) of the filter's room; its epsilon is exact, at the ledger's delta. A study that samples its
    patients may cost the filter more. Before a ledger's first study the exact figure has room for the cap.

    Args:
        view: the ledger.

    Returns:
        Epsilon, 0 where nothing fits; None after a release without noise.
    """
    cap = float(view.opening["cap"])
    reserved = list(view.outstanding())
    if not view.recovered and not view.events() and not reserved:
        return cap
    room = cap - view.filtered([*reserved, _study(FAINT)])
    if math.isinf(room):
        return None
    return epsilon([_study(math.sqrt(view.order / (2 * room)))], view.delta) if room > 0 else 0.0


def _study(sigma: float) -> PrivacyEvent:
    return PrivacyEvent(kind="noisy_statistic", released="", noise_multiplier=sigma)
