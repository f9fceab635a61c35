"""Long tests run a sample of their cases; with EVERY=1 in the environment, all of them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TypeVar

Case = TypeVar("Case")
EVERY = bool(os.environ.get("EVERY"))


def sample(cases: Iterable[Case], step: int) -> list[Case]:
    """One case in so many; the same ones in every run."""
    return list(cases)[:: 1 if EVERY else step]
