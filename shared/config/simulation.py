"""What a study may ask of a simulation, and of no deployed site."""

from __future__ import annotations

from typing import Any, Literal, Self, get_args

from pydantic import Field, model_validator

from gapweave.shared.config.base import StrictModel

UpdateAttack = Literal[
    "sign_flip", "times_100", "nan", "inf", "zero", "stale", "alie", "inner_product", "mimic", "min_max", "adaptive"
]
LabelAttack = Literal["label_flip", "swap_labels"]
Attack = Literal["none", "absent", UpdateAttack, LabelAttack]
UPDATE_ATTACKS: tuple[str, ...] = get_args(UpdateAttack)
"""Attacks that change what a bad site sends."""
LABEL_ATTACKS: tuple[str, ...] = get_args(LabelAttack)
"""Attacks that change a bad site's training labels."""


class Simulation(StrictModel):
    """What only a simulation may do to its sites; `submit` refuses a study that sets it."""

    missing_rate: float = Field(0.0, ge=0, lt=1, description="share of present modalities hidden, in training and test")
    missing: Literal["mcar", "mnar"] = Field("mcar", description="hidden at random, or more often for positives")
    attack: Attack = Field(
        "none", description="what bad sites send, or do to their labels; absent: they are not there, to compare with"
    )
    bad_sites: int = Field(
        0,
        ge=0,
        description="number of bad sites, drawn by the seed; their scores are not counted (default: 1 with an attack)",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_bad_site(cls, data: Any) -> Any:
        attacked = isinstance(data, dict) and data.get("attack", "none") != "none"
        return {"bad_sites": 1, **data} if attacked else data

    @model_validator(mode="after")
    def _somebody_is_bad(self) -> Self:
        if self.attack != "none" and not self.bad_sites:
            raise ValueError(f"attack={self.attack} with bad_sites=0: nobody attacks")
        return self
