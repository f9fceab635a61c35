"""Training schemes: which of a record's modalities a training step uses.

A scheme is a function of one record's own mask and of private uniform draws; nothing in it couples patients.
Docstrings have the sections of the fusions' (shared/fusion).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gapweave.shared.registry import Registry

DROP_RATE = 0.6
"""Share of training records of which only a random subset of modalities is used."""

Scheme = Callable[[Tensor, Tensor, bool], Tensor]
"""(present [B, M] bool, uniform [B, M + 1], whether the imputer learns) -> used [B, M] bool."""

SCHEMES: Registry[Scheme] = Registry("scheme", "gapweave.shared.schemes")


def random_subset(present: Tensor, uniform: Tensor) -> Tensor:
    """With probability `DROP_RATE` a random non-empty subset of a record's modalities, else all of them.

    Args:
        present: [B, M] bool.
        uniform: [B, M + 1] independent uniform draws in [0, 1).

    Returns:
        used [B, M] bool, a subset of present, non-empty wherever present is.
    """
    draw = torch.where(present, uniform[:, :-1], 2.0)
    at_least_one = draw == draw.amin(1, keepdim=True)
    subset = present & ((draw < 0.5) | at_least_one)
    return torch.where(uniform[:, -1:] < DROP_RATE, subset, present)
