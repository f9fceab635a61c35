"""What a site may state of itself: read once at the door, so that no later sum or figure meets an absurd number."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gapweave.server.peers import Peer
from gapweave.shared.config.base import SiteName
from gapweave.shared.config.study import Study
from gapweave.shared.privacy.plan import LARGEST_NOISE, SMALLEST_NOISE

MOST_PATIENTS = 10**9
MOST_STEPS = 10**6
MOST_EVENTS = 1000
MOST_MECHANISMS = 50
"""Kinds of release with noise of their own, beside the training."""
MOST_COST = 1000.0
"""Epsilon of all that is released beside the training, about: what more costs takes minutes to compute."""
MOST_NAMED, LONGEST_NAME = 5, 80
SMALLEST_SCALE = 0.01
"""Of the noise in a count: an epsilon of 100 for that alone."""
LONGEST_TEXT = 500
"""Characters of a site's own words that a hub keeps: each round's stand in its log and in the report."""


class _Stated(BaseModel):
    """What is not known here may be there: a newer site tells more."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class _Event(_Stated):
    """A release, as far as its cost follows from it."""

    kind: str = Field("", max_length=LONGEST_TEXT)
    noise_multiplier: float = Field(0.0, ge=0, le=MOST_PATIENTS)
    sample_rate: float = Field(1.0, gt=0, le=1)
    steps: int = Field(1, ge=1, le=MOST_STEPS)
    max_grad_norm: float = Field(1.0, ge=0)

    @model_validator(mode="after")
    def _payable(self) -> _Event:
        """What less noise costs could not be computed: the memory that it takes grows as the noise falls."""
        least = SMALLEST_NOISE / 2 if self.kind == "dp_sgd" else SMALLEST_SCALE
        if 0 < self.noise_multiplier < least:
            raise ValueError("less noise than any release has")
        return self


class _Plan(_Stated):
    """A site's plan (`client/capability.py`)."""

    noise_multiplier: float = Field(0.0, ge=0, le=LARGEST_NOISE)
    sample_rate: float = Field(1.0, gt=0, le=1)
    n_hat: int = Field(1, ge=1, le=MOST_PATIENTS)
    delta: float = Field(1e-5, gt=0, lt=1)
    preparation: list[_Event] = Field([], max_length=MOST_EVENTS)
    table: _Event | None = None
    no_table: str = Field("", max_length=LONGEST_TEXT)
    looks: list[_Event] = Field([], max_length=MOST_EVENTS)
    no_looks: str = Field("", max_length=LONGEST_TEXT)

    @model_validator(mode="after")
    def _payable(self) -> _Plan:
        """What could not be computed, or not before the hub's users lose patience."""
        if 0 < self.noise_multiplier < SMALLEST_NOISE / 2:
            raise ValueError("less noise than any plan has")
        beside = [*self.preparation, *self.looks, *([self.table] if self.table else [])]
        if any(event.kind == "dp_sgd" for event in beside):
            raise ValueError("training that is no round's")
        noised = [event for event in beside if event.noise_multiplier > 0]
        if len({(event.kind, event.noise_multiplier) for event in noised}) > MOST_MECHANISMS:
            raise ValueError("more mechanisms than any site needs")
        if sum(event.steps / min(event.noise_multiplier, event.noise_multiplier**2) for event in noised) > MOST_COST:
            raise ValueError("costs more than any budget")
        return self


class _Handshake(_Stated):
    """A capability (`client/capability.py`)."""

    site: str = Field("", pattern=f"{SiteName}|^$", max_length=LONGEST_TEXT)
    modalities: list[str] = Field([], max_length=MOST_EVENTS)
    groups: list[str] = []
    rounds: int = Field(0, ge=0, le=MOST_STEPS)
    plan: _Plan = _Plan()
    ledger: dict[str, Any] = {}


def well_formed(header: dict[str, Any]) -> bool:
    """Whether a handshake's fields are those of a capability, in bounds that any hospital is within."""
    try:
        _Handshake.model_validate(header)
    except ValidationError:
        return False
    return True


def unfit(study: Study, shared: Collection[str], peer: Peer) -> str:
    """Why a well-formed handshake does not fit the study; empty when it does.

    Names end up in files that people read, and a plan without noise would switch off what the hub computes from noise.

    Args:
        study: of the run.
        shared: names of its shared groups.
        peer: as it declared itself.
    """
    foreign = sorted(set(peer.groups) - set(shared))
    if foreign:
        named = [name[:LONGEST_NAME] for name in foreign[:MOST_NAMED]]
        return f"declares groups that the study does not share: {named}"
    if len(set(peer.groups)) < len(peer.groups):
        return "declares a group twice"
    if not set(peer.modalities) <= set(study.order):
        return "declares modalities that the study does not have"
    stated = ("noise_multiplier", "sample_rate", "n_hat")
    if peer.status == "ok" and study.privacy.enabled and not all(peer.plan.get(key) for key in stated):
        return "states no noise, in a study with privacy"
    return ""


def malformed(header: dict[str, Any]) -> dict[str, Any]:
    """A handshake that cannot be used, as one that failed; its name only where it is one."""
    name = header.get("site") if well_formed({"site": header.get("site")}) else None
    return {"site": name, "status": "failed", "text": "a handshake of another form"}
