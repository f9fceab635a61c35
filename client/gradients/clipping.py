"""Which of a patient's gradients are clipped together, and what they are multiplied with.

Guarantee: each of G groups is clipped to C_g = C / sqrt(G), so that a patient's whole contribution, of squared length
at most G C_g^2 = C^2, stays within C. All groups get noise of the same sd s = sigma C, so that the event's multiplier
is 1 / sqrt(sum of (C_g / s)^2) = sigma, whatever G: event, noise and accounting are those of one group.

Assumes: G follows from the site's model alone, never from what patients have.

Edge cases: a patient whose norm is not finite, or beyond `LARGEST`, in one group contributes zero to all; a group that
no record uses is zero and keeps its share of the bound.

Reference: McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models" (arXiv 1710.06963),
per-layer clipping.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from gapweave.shared.model import group_of

LARGEST = 1e30
"""Norms of more times the bound are left out, as those that are not finite: their factor would be no normal float32
number, which is rounded by up to its whole size. A server can send parameters with which every patient's is."""

Grouping = Callable[[str], str]
"""From a parameter's name to that of its group."""


def together(_: str) -> str:
    """One group of all parameters."""
    return "all"


def by_part(parameter: str) -> str:
    """A group each for an encoder, a head, the imputer and the fusion."""
    return group_of(parameter)[0]


GROUPINGS: dict[str, Grouping] = {"flat": together, "group": by_part}
"""By the study's `privacy.clipping`."""


def grouped(parameters: Iterable[str], grouping: Grouping) -> list[list[str]]:
    """Names of the parameters of each group, groups in the order of their first."""
    found: dict[str, list[str]] = {}
    for parameter in parameters:
        found.setdefault(grouping(parameter), []).append(parameter)
    return list(found.values())


def clip_factors(norms: Tensor, bound: float) -> tuple[Tensor, Tensor | None]:
    """What patients' gradients are multiplied with.

    Args:
        norms: [G, P] by group.
        bound: C, of a patient's gradients in all groups.

    Returns:
        [G, P] factors, 0 for patients who are left out; [P] bool, who is kept, None for all.
    """
    finite = (norms <= LARGEST * bound).all(0)
    # Selected, not multiplied away: zero times NaN is NaN.
    factors = torch.where(finite, (bound / math.sqrt(len(norms)) / norms.clamp(min=1e-12)).clamp(max=1.0), 0.0)
    return factors, None if bool(finite.all()) else finite
