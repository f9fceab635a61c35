"""Part (b) of an audit: the noise of a step has the declared law, in every tensor, and never comes again."""

from __future__ import annotations

import itertools
import math
import os

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gapweave.client.audit_sensitivity import ORDINARY, flat, scaled_model, silent_step
from gapweave.client.audit_site import Finding, Scene, Scripted, finding, nobody
from gapweave.client.audit_tally import Tally, chi_square
from gapweave.client.gradients import Gradient
from gapweave.client.training import Step
from gapweave.shared.model import MultimodalModel
from gapweave.shared.privacy.draws import Draws
from gapweave.shared.schema import Batch
from gapweave.shared.schemes import Objective

VALUES = 2_000_000
"""Noise values that are looked at."""
CORRELATED = 0.15
"""Correlation of two noise vectors that independent ones of `TWINS` values exceed at 10 standard deviations."""
TWINS = 4608
PATTERN = 0.25
"""Correlation of such a vector with itself that chance exceeds at 12 standard deviations."""
GRID = 2.0**-12
"""Least width of a release's grid, as a share of the noise, before it is rounded down to a power of two."""


def noise_law(scene: Scene) -> Finding:
    """A release less its un-noised value is normal with the declared sd, in every tensor, and never repeats."""
    sd = scene.plan.noise_multiplier * scene.plan.max_grad_norm / (scene.plan.sample_rate * scene.plan.n_hat)
    model = scaled_model(scene, ORDINARY)
    faults = [*_law(scene, model, sd), *_repeats(scene)]
    return finding("noise law", faults, {"sd": sd, "values": float(VALUES)})


def _law(scene: Scene, model: MultimodalModel, sd: float) -> list[str]:
    quiet = silent_step(scene, model)
    step = scene.step(quiet.engine, Scripted(scene.participant("law").learner.real_draws()))
    tally = Tally({name: parameter.numel() for name, parameter in model.named_parameters()})
    rounds = math.ceil(VALUES / tally.width)
    faults = []
    full, empty = scene.canaries((1,) * 6, seed=14), nobody(scene.patients)
    for name, batch, count in (("patients", full, min(rounds, 40)), ("nobody", empty, rounds)):
        exact, before = flat(quiet.gradient(batch)), tally.squares.sum()
        for _ in range(count):
            tally.add((flat(step.gradient(batch)) - exact) / sd)
        part = float(tally.squares.sum() - before)
        if not chi_square(part, count * tally.width):
            ratio = math.sqrt(part / (count * tally.width))
            faults.append(f"noise with {name} in the batch is {ratio:.4g} of the declared")
    return [*faults, *tally.faults()]


def _repeats(scene: Scene) -> list[str]:
    """Noise of two steps and rounds, of a restarted site, and of a forked process: without pattern or repetition."""
    first, again = (scene.participant("twin") for _ in range(2))
    step = _zero_step(scene, first.learner.real_draws())
    vectors = {
        "a round": _noise(scene, step),
        "the next step": _noise(scene, step),
        "another round": _noise(scene, _zero_step(scene, first.learner.real_draws(2))),
        "a restart": _noise(scene, _zero_step(scene, again.learner.real_draws())),
        "a fork": _in_fork(scene, step),
        "the fork's parent": _noise(scene, step),
    }
    faults = [f"{name} has no noise" for name, vector in vectors.items() if not vector.any()]
    if faults:
        return faults
    for one, other in itertools.combinations(vectors, 2):
        if not abs(_correlation(vectors[one], vectors[other])) < CORRELATED:
            faults.append(f"the noise of {one} comes again in {other}")
    for name, vector in vectors.items():
        if not pattern(vector) < PATTERN:
            faults.append(f"the numbers of {name} are correlated among themselves")
        if not _on_the_grid(scene, vector):
            faults.append(f"{name} is not on the declared grid: its last digits tell of the sum")
    return faults


def pattern(vector: NDArray[np.float64]) -> float:
    """Largest correlation of a vector, and of its squares, with itself shifted or mirrored by any number of places."""
    worst = 0.0
    for values in (vector, np.square(vector) - np.square(vector).mean()):
        if not values.any():
            return 1.0
        spectrum = np.fft.rfft(values)
        shifted = np.fft.irfft(spectrum * spectrum.conj(), len(values))[1:]
        mirrored = np.fft.irfft(spectrum * spectrum, len(values))
        worst = max(worst, float(np.abs(np.concatenate([shifted, mirrored])).max() / (values @ values)))
    return worst


def _on_the_grid(scene: Scene, vector: NDArray[np.float64]) -> bool:
    """Whether a release of zeros consists of whole multiples of the coarse grid (docs/decisions/0007)."""
    plan = scene.plan
    grid = math.ldexp(1.0, math.frexp(GRID * plan.noise_multiplier * plan.max_grad_norm)[1] - 1)
    cells = vector * (plan.sample_rate * plan.n_hat / grid)
    # A release is a float32: its error is far below a hundredth of a cell.
    return bool((np.abs(cells - cells.round()) < 0.02).all())


def _correlation(left: NDArray[np.float64], right: NDArray[np.float64]) -> float:
    return float(left @ right) / math.sqrt(float(left @ left) * float(right @ right))


def _zero_step(scene: Scene, draws: Draws) -> Step:
    """The step on an engine of zeros; small enough to be safe in a forked child."""
    return scene.step(_Zeros(scene.plan.max_grad_norm), Scripted(draws))


def _noise(scene: Scene, step: Step) -> NDArray[np.float64]:
    return flat(step.gradient(nobody(scene.patients.to(torch.device("cpu")))))


class _Zeros:
    """An engine of zeros."""

    def __init__(self, sensitivity: float) -> None:
        self.sensitivity = sensitivity

    def sum(self, batch: Batch, used: Tensor, objective: Objective | None = None) -> Gradient:
        """Zeros."""
        del batch, used, objective
        return {"zeros": torch.zeros(TWINS)}


def _in_fork(scene: Scene, step: Step) -> NDArray[np.float64]:
    """The noise of a child process that starts as a copy of this one."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            with os.fdopen(write, "wb") as out:
                out.write(_noise(scene, step).tobytes())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as source:
        content = source.read()
    os.waitpid(child, 0)
    return np.frombuffer(content, np.float64)
