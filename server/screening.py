"""What is looked at before a rule sees an update: keys, shapes, finiteness. A rejection is named, never silent."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

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
        if not np.isfinite(value).all():
            return f"{name} is not finite"
    return None


def norm(update: Part) -> float:
    """L2 norm of an update over all its tensors, in float64."""
    return float(np.sqrt(sum(np.square(value.astype(np.float64)).sum() for value in update.values())))
