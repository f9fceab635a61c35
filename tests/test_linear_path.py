"""What a small cohort learns with: a linear path to the logits, hidden features, a ridge, and one gradient a round."""

from __future__ import annotations

LINEAR = {"linear_path": True}
