"""The study file's `training`: how sites train between two aggregations, and after the last."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from gapweave.shared.config.base import StrictModel

MOST_STEPS = 10_000
"""Most optimiser steps a round at one site."""


class EarlyStop(StrictModel):
    """Looks at the scores on the way: sites release a noised table after some rounds, and the run may end early."""

    every: int = Field(5, ge=1, description="rounds between two looks")
    patience: int = Field(2, ge=1, description="looks without a better AUROC after which the run ends")
    epsilon: float = Field(
        1.0,
        gt=0,
        description="cost of all looks together at a site, within the study's epsilon and at most a quarter of it",
    )


class Training(StrictModel):
    """How sites train between two aggregations."""

    schedule: Literal["fedavg", "fedsgd"] = Field(
        "fedavg",
        description="fedavg: local steps between aggregations; fedsgd: one gradient of all patients a round, for a "
        "server optimiser to step along",
    )
    rounds: int = Field(30, ge=1, le=100_000, description="number of rounds")
    local_steps: int = Field(5, ge=1, le=MOST_STEPS, description="optimiser steps a round at each site")
    passes: float | None = Field(
        None,
        gt=0,
        description="in place of local_steps: passes over its own patients that each site makes a round, so passes x "
        "(public number of patients) / batch steps; updates then count a step (FedNova)",
    )
    batch: int = Field(64, ge=1, description="expected number of patients a step (Poisson sampling)")
    lr: float = Field(0.05, gt=0, description="learning rate")
    momentum: float = Field(0.0, ge=0, lt=1, description="momentum of the site's optimiser, kept between rounds")
    weight_decay: float = Field(0.0, ge=0, description="L2 shrinkage of all parameters")
    ridge: float = Field(
        0.0,
        ge=0,
        description="L2 shrinkage in multiples of p (1 - p), p the public prevalence in preparation.class_balance or "
        "0.5: as strong against the curvature of the loss for a rare outcome as for a common one",
    )
    proximal: float = Field(
        0.0,
        ge=0,
        description="FedProx: pull of the shared parameters towards those that the round began with, after the noise",
    )
    scaffold: bool = Field(
        False,
        description="SCAFFOLD: correct each step, after the noise, by how the site's gradients differ from those of "
        "all; twice the bytes to the sites",
    )
    early_stop: EarlyStop | None = Field(
        None,
        description="end when the median site's AUROC stops getting better, by tables that each site charges "
        "to its budget; a simulation without privacy uses exact figures",
    )
    finetune: bool = Field(
        False, description="fine-tune privately at each site after the last upload; that copy never leaves"
    )
    finetune_steps: int = Field(20, ge=1, description="steps of fine-tuning, charged to the same budget")
    finetune_lr: float | None = Field(None, gt=0, description="learning rate of fine-tuning (default: lr)")
    finetune_pull: float = Field(
        0.1,
        ge=0,
        description="L2-SP: pull of all parameters towards the federated ones that fine-tuning began with, after the "
        "noise",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_step(cls, data: Any) -> Any:
        return {"local_steps": 1, **data} if isinstance(data, dict) and data.get("schedule") == "fedsgd" else data

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.schedule == "fedsgd" and (self.passes is not None or self.local_steps != 1):
            raise ValueError("schedule: fedsgd is one step a round: leave passes out, and local_steps, or make it 1")
        if self.lr * self.proximal >= 1:
            raise ValueError(f"lr * proximal = {self.lr * self.proximal:g} must be below 1, or each step overshoots")
        if self.finetune and (self.finetune_lr or self.lr) * self.finetune_pull >= 1:
            raise ValueError(f"finetune_pull={self.finetune_pull:g} must be below 1 / the learning rate of fine-tuning")
        if self.scaffold and (self.momentum or self.proximal):
            raise ValueError("scaffold needs plain steps: set momentum and proximal to 0")
        if self.early_stop is not None and not self.looks:
            raise ValueError(f"early_stop.every={self.early_stop.every} must be below rounds={self.rounds}")
        return self

    @property
    def looks(self) -> tuple[int, ...]:
        """Rounds after which the scores are looked at; the last one's are asked for anyway."""
        if self.early_stop is None:
            return ()
        return tuple(range(self.early_stop.every, self.rounds, self.early_stop.every))

    def steps_for(self, patients: int) -> int:
        """Steps a round at a site with so many training patients, which is a public number."""
        if self.passes is None:
            return self.local_steps
        return max(1, round(min(self.passes * patients / self.batch, MOST_STEPS)))
