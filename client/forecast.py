"""What training will take of a machine, foretold by steps on synthetic patients: nothing of a site's data is needed."""

from __future__ import annotations

import math
import resource
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gapweave.client.canaries import canaries
from gapweave.client.device import find_device
from gapweave.client.learner import Learner
from gapweave.client.state import RoundState, to_arrays
from gapweave.shared.config.study import Study
from gapweave.shared.privacy.plan import make_plan
from gapweave.shared.schema import modalities

MOST_NUMBERS = 5_000_000
"""Numbers that the synthetic patients hold: of more, a part is tried."""
SHORT_S = 2.0
"""A first step of less is followed by another, which has nothing left to set up."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a study's training takes of a site.

    Attributes:
        patients: training patients that were assumed, each with one record and every modality.
        seconds: of all steps.
        memory: bytes at most, with the program itself; of a GPU its own.
        device: on which this was measured.
    """

    patients: int
    seconds: float
    memory: int
    device: str

    def __str__(self) -> str:
        """In words."""
        return (
            f"training at a site of {self.patients} patients who have everything takes about {_duration(self.seconds)} "
            f"on this machine's {self.device}, and {math.ceil(self.memory / 1e7) * 10} MB of memory; a simulation "
            "trains its sites in turn"
        )


def forecast(study: Study, patients: int) -> Forecast:
    """Take a step or two as a site would, and multiply.

    Args:
        study: what all sites agree on.
        patients: public number of a site's training patients.

    Raises:
        UsageError: when no noise reaches the study's target at such a site.
    """
    device = find_device("auto", Path("study"))
    plan = make_plan(study, patients, study.privacy.delta)
    expected = max(1, round(plan.sample_rate * patients))
    numbers = sum(math.prod(modality.shape) for modality in modalities(study))
    tried = min(expected, max(1, MOST_NUMBERS // numbers))
    batch = canaries(study, study.order, [1] * tried).to(device)
    learner = Learner(study, "forecast", study.order, device, lambda: batch)
    received = to_arrays({group: learner.initial[group] for group in learner.shared})
    one_step = replace(plan, sample_rate=1.0, steps=1)

    def step_s() -> float:
        started = time.perf_counter()
        learner.round(one_step, 1, "", RoundState(), received)
        return time.perf_counter() - started

    seconds = step_s()
    if seconds < SHORT_S:
        seconds = step_s()
    steps = plan.rounds * plan.steps + plan.finetune_steps
    return Forecast(
        patients=patients, seconds=steps * seconds * expected / tried, memory=_peak(device), device=device.type.upper()
    )


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _duration(seconds: float) -> str:
    """In the unit that people would use.

    >>> _duration(0.2), _duration(40), _duration(300), _duration(9000)
    ('1 second', '40 seconds', '5 minutes', '2.5 hours')
    """
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} hours"
    count, unit = (round(seconds / 60), "minute") if seconds >= 120 else (max(1, round(seconds)), "second")
    return f"{count} {unit}{'' if count == 1 else 's'}"
