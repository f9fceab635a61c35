"""From how many patients on anything is said of how well a model does; by itself, since it is asked before torch is."""

from __future__ import annotations

FEWEST = 8
"""Held-out patients of each class without whom nothing is said."""
