"""What an audit puts in the place of a hospital: synthetic patients, and witnesses around the real code.

Nothing here knows a real patient. The site's own class, step, engine, draws and ledger do the work; the witnesses
only hand through and remember.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gapweave.client.canaries import canaries
from gapweave.client.data import Cohort
from gapweave.client.gradients import Gradient, GradientEngine
from gapweave.client.learner import Learner
from gapweave.client.participant import Participant
from gapweave.client.training import Step
from gapweave.shared.config.site import Patients, Site
from gapweave.shared.config.study import Study
from gapweave.shared.privacy.draws import Draws
from gapweave.shared.privacy.plan import Plan
from gapweave.shared.schema import Batch
from gapweave.shared.schemes import Objective

RECORDS = (1, 2, 1, 3, 1, 1, 5, 1)
"""Records of the synthetic patients, repeated as often as needed."""
RUN = "audit"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one part of an audit found.

    Attributes:
        part: sensitivity, noise law, black box, provenance, record or one run.
        passed: whether the declared event stood.
        text: what was seen, in words.
        figures: the numbers behind it.
    """

    part: str
    passed: bool
    text: str
    figures: dict[str, float] = field(default_factory=dict)


def finding(part: str, faults: Sequence[str], figures: dict[str, float]) -> Finding:
    """A part that passed, or the faults that it found."""
    return Finding(part=part, passed=not faults, text="; ".join(faults) or "as declared", figures=figures)


def joined(one: Batch, other: Batch) -> Batch:
    """The patients of both, the second's after the first's: the first's draws stay the same."""
    return Batch(
        inputs={name: torch.cat([rows, other.inputs[name]]) for name, rows in one.inputs.items()},
        present=torch.cat([one.present, other.present]),
        target=torch.cat([one.target, other.target]),
        label_mask=torch.cat([one.label_mask, other.label_mask]),
        patient=torch.cat([one.patient, other.patient + one.patients]),
        weight=torch.cat([one.weight, other.weight]),
        patients=one.patients + other.patients,
    )


def nobody(batch: Batch) -> Batch:
    """A batch without patients."""
    return batch.of_patients(torch.zeros(0, dtype=torch.int64, device=batch.patient.device))


def scaled(batch: Batch, factor: float) -> Batch:
    """The same records with all inputs multiplied."""
    return replace(batch, inputs={name: rows * factor for name, rows in batch.inputs.items()})


class Scripted:
    """Draws of which the uniform part is public: everyone is sampled, and the n-th record's mask is always the same.

    Args:
        normals: where normal numbers come from; zeros by default.
        level: what is drawn for every patient.
    """

    def __init__(self, normals: Draws | None = None, level: float = 0.0) -> None:
        self._normals, self._level = normals, level

    def uniform(self, *shape: int) -> NDArray[np.float64]:
        """One number for patients; rows that do not depend on how many follow for records."""
        if len(shape) == 1:
            return np.full(shape, self._level)
        return np.random.default_rng(1).random(shape)

    def normal(self, size: int) -> NDArray[np.float64]:
        """From the given draws."""
        return np.zeros(size) if self._normals is None else self._normals.normal(size)


class Heard:
    """Draws that remember what they gave.

    Args:
        draws: the real ones.
    """

    def __init__(self, draws: Draws) -> None:
        self._draws = draws
        self.uniforms: list[NDArray[np.float64]] = []
        self.normals: list[NDArray[np.float64]] = []

    def uniform(self, *shape: int) -> NDArray[np.float64]:
        """Handed through; a step may go on to work in the array that it got."""
        drawn = self._draws.uniform(*shape)
        self.uniforms.append(drawn.copy())
        return drawn

    def normal(self, size: int) -> NDArray[np.float64]:
        """Handed through."""
        drawn = self._draws.normal(size)
        self.normals.append(drawn.copy())
        return drawn


class Watched:
    """An engine that remembers its batches and sums; without a real one it only counts who came.

    Args:
        engine: the real one, or None for sums of zero.
        at_work: called before each sum.
    """

    def __init__(self, engine: GradientEngine | None, at_work: Callable[[], object] = lambda: None) -> None:
        self._engine, self._at_work = engine, at_work
        self.sensitivity = 1.0 if engine is None else engine.sensitivity
        self.batches: list[Batch] = []
        self.sums: list[Gradient] = []

    def sum(self, batch: Batch, used: Tensor, objective: Objective | None = None) -> Gradient:
        """The real engine's sum."""
        self._at_work()
        self.batches.append(batch)
        self.sums.append(
            {"none": torch.zeros(64)} if self._engine is None else self._engine.sum(batch, used, objective)
        )
        return self.sums[-1]


class CanaryLearner(Learner):
    """The real learner of a site, its draws and engine heard.

    Args:
        site: whose.
        at_work: called before the engine sees a batch.
        draws: in place of the real ones.

    Attributes:
        heard: the draws of each round.
    """

    def __init__(self, site: Participant, at_work: Callable[[], object], draws: Draws | None) -> None:
        super().__init__(site.study, site.site.name, site.held, site.device, lambda: site.training)
        self._at_work, self._given = at_work, draws
        self.heard: list[Heard] = []

    @cached_property
    def engine(self) -> Watched:
        """The site's engine."""
        return Watched(super().engine, self._at_work)

    def draws(self, number: int | str) -> Draws:
        """Those of the site, or the given ones."""
        self.heard.append(Heard(self._given or super().draws(number)))
        return self.heard[-1]

    def real_draws(self, number: int = 1) -> Draws:
        """The draws that the site would use in a round."""
        return super().draws(number)


class CanarySite(Participant):
    """The real participant over synthetic patients, its draws and engine heard.

    Args:
        study: under audit.
        site: the hospital's file; none of its data are opened.
        state: a folder for this site's ledger.
        batch: the synthetic patients.
        at_work: called before the engine sees a batch.
        draws: in place of the real ones.
    """

    def __init__(
        self,
        study: Study,
        site: Site,
        *,
        state: Path,
        batch: Batch,
        at_work: Callable[[], object] = lambda: None,
        draws: Draws | None = None,
    ) -> None:
        super().__init__(study, site, site_file=Path("audit"), state=state, simulation=True)
        self._batch = batch
        self.learner: CanaryLearner = CanaryLearner(self, at_work, draws)

    @cached_property
    def cohort(self) -> Cohort:
        """Synthetic patients instead of the site's files."""
        return Cohort(
            site=self.site.name,
            batch=self._batch,
            record_ids=tuple(f"canary record {at}" for at in range(len(self._batch))),
            patient_ids=tuple(f"canary {at}" for at in range(self._batch.patients)),
            test=torch.zeros(self._batch.patients, dtype=torch.bool),
            subgroups={},
        )


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What all parts of an audit share.

    Attributes:
        study: under audit.
        site: the hospital's file with public numbers for the audit.
        folder: for ledgers of the audit.
        patients: the synthetic cohort.
        plan: how the site would train.
    """

    study: Study
    site: Site
    folder: Path
    patients: Batch
    plan: Plan

    @property
    def held(self) -> list[str]:
        """Modalities of the site."""
        return self.site.held(self.study)

    def canaries(self, records: Sequence[int], seed: int) -> Batch:
        """Further synthetic patients, where the site computes."""
        return canaries(self.study, self.held, records, seed).to(self.patients.present.device)

    def participant(self, name: str, batch: Batch | None = None, **options: Any) -> CanarySite:
        """A site with a state folder of its own."""
        return CanarySite(
            self.study,
            self.site,
            state=self.folder / name,
            batch=self.patients if batch is None else batch,
            **options,
        )

    def step(self, engine: Any, draws: Draws) -> Step:
        """The site's step."""
        return Step(study=self.study, plan=self.plan, engine=engine, draws=draws)


def audit_copy(study: Study, site: Site, patients: int) -> Site:
    """The site file with a declared number of patients, and a policy that never stops the audit's own ledger."""
    declared = site.patients.declared or 8 * study.training.batch
    public = Patients(declared=declared, upper=site.patients.upper, max_records=site.patients.max_records)
    policy = site.policy.model_copy(
        update={
            "epsilon": 1e6,
            "min_patients": min(site.policy.min_patients, patients),
            "releases": ("update", "counts"),
            "anchor": None,
        }
    )
    return site.model_copy(update={"patients": public, "policy": policy})
