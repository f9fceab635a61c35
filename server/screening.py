"""What is looked at before a rule sees an update: keys, shapes, numbers, noise. A rejection is named, never silent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gapweave.shared.config.study import Study
from gapweave.shared.privacy.plan import noise_of_steps

LONGEST = 30.0
"""Norm of an update, over the median one of its group, from which it is a fault of scale."""
REPRESENTABLE = 1e15
"""Largest number in an update: squares of larger ones leave float32."""
UNLIKELY = 1e-9
"""Probability with which an honest update is taken for one without its noise."""

Part = Mapping[str, NDArray[np.float32]]


def reason_to_reject(update: Part, current: Part) -> str | None:
    """Why an update of one group cannot be aggregated.

    Args:
        update: what a site sent.
        current: the group as the server has it.

    Returns:
        The reason, or None when nothing is wrong.
    """
    if update.keys() != current.keys():
        return "other keys than the group has"
    for name, value in update.items():
        if value.shape != current[name].shape:
            return f"{name} has shape {value.shape}, the group {current[name].shape}"
        largest = np.abs(value).max(initial=0.0)  # not a number where one is not
        if not np.isfinite(largest):
            return f"{name} is not finite"
        if largest > REPRESENTABLE:
            return f"{name} holds a number above {REPRESENTABLE:g}"
    return None


def too_long(norms: Mapping[str, float], noise: float = 0.0) -> dict[str, str]:
    """Updates of one group that are far longer than the others: faults of scale, which no case mix explains.

    Only among three and more can one be told from the others. What is merely longer is the rule's to judge.

    Args:
        norms: of the updates, by site.
        noise: norm that the noise of an update has; of a group of one number the median one may be much shorter by
            chance.

    Returns:
        Reasons, by site.
    """
    if len(norms) < 3:
        return {}
    middle = max(noise, sorted(norms.values())[(len(norms) - 1) // 2])
    return {
        site: f"its norm is over {LONGEST:g} times what is usual"
        for site, value in norms.items()
        if value > LONGEST * middle > 0
    }


def noise_sd(study: Study, plan: Mapping[str, Any]) -> float:
    """Standard deviation of the noise in each coordinate of an honest update, by the site's own plan.

    Args:
        study: how sites train.
        plan: as the site declared it.

    Returns:
        0 where it cannot be told: without privacy, with momentum, which brings noise from earlier rounds, or for a plan
        of another form.
    """
    try:
        return _noise_sd(study, plan)
    except ArithmeticError:  # a plan of numbers beyond all bounds ends no run
        return 0.0


def _noise_sd(study: Study, plan: Mapping[str, Any]) -> float:
    numbers = [plan.get(key) for key in ("noise_multiplier", "sample_rate", "n_hat")]
    known = [float(number) for number in numbers if isinstance(number, (int, float)) and 0 < number < math.inf]
    if not study.privacy.enabled or study.training.momentum or len(known) < 3:
        return 0.0
    multiplier, rate, n_hat = known
    of_a_step = multiplier * study.privacy.max_grad_norm / (rate * n_hat)
    return noise_of_steps(study, study.training.steps_for(int(n_hat)), of_a_step)


def too_quiet(length: float, numbers: int, sd: float) -> str | None:
    """Why an update cannot hold the noise that its site's plan says: a fault of the site, or a lie.

    Whatever the data add makes an update longer, by law of the non-central chi-squared distribution. Who adds noise of
    its own cannot be seen here.

    Args:
        length: norm of the update.
        numbers: how many numbers it holds.
        sd: of the noise in each; 0 for unknown.
    """
    if sd == 0:
        return None
    from scipy.special import gammaincinv

    least = sd * math.sqrt(2 * gammaincinv(numbers / 2, UNLIKELY))
    return "it is shorter than the noise that its plan says" if length < least else None


def norm(update: Part) -> float:
    """L2 norm of an update over all its tensors."""
    with np.errstate(over="ignore"):
        return math.sqrt(sum(_squares(value.ravel()) for value in update.values()))


def _squares(flat: NDArray[np.float32]) -> float:
    """In float32, which is four times as fast, unless that overflows."""
    total = float(np.dot(flat, flat))
    return total if np.isfinite(total) else float(np.square(flat, dtype=np.float64).sum())
