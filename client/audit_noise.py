"""Parts (b) and (c) of an audit: the noise of a step, and what an attacker makes of its releases."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from gapweave.client.audit_sensitivity import FAINT, ORDINARY, SLACK, STRONG, flat, scaled_model, silent_step
from gapweave.client.audit_site import Finding, Scene, Scripted, finding, joined, nobody, scaled
from gapweave.client.gradients import Gradient
from gapweave.client.training import Step
from gapweave.shared.model import MultimodalModel
from gapweave.shared.privacy.draws import Draws
from gapweave.shared.schema import Batch

ALPHA = 1e-6
"""False alarms of one test; at most ten tests have any (see docs/decisions/0008)."""
VALUES = 2_000_000
"""Noise values whose standard deviation must be within `WITHIN` of the declared one: 20 of its own."""
WITHIN = 0.01
CORRELATED = 0.15
"""Correlation of two noise vectors that independent ones of `TWINS` values exceed at 10 standard deviations."""
TWINS = 4608
SIDE = 8000
"""Values a side of the black box."""
BOX_SECONDS = 25.0
"""After this long the black box decides with the values that it has."""


def noise_law(scene: Scene) -> Finding:
    """A release less its un-noised value is normal with the declared sd, in every tensor, and never repeats."""
    sd = scene.plan.noise_multiplier * scene.plan.max_grad_norm / (scene.plan.sample_rate * scene.plan.n_hat)
    model = scaled_model(scene, ORDINARY)
    faults = [*_law(scene, model, sd), *_repeats(scene)]
    return finding("noise law", faults, {"sd": sd, "values": float(VALUES)})


def _law(scene: Scene, model: MultimodalModel, sd: float) -> list[str]:
    quiet = silent_step(scene, model)
    step = scene.step(quiet.engine, Scripted(scene.participant("law").real_draws()))
    sizes = [parameter.numel() for parameter in model.parameters()]
    rounds = math.ceil(VALUES / sum(sizes))
    busy = min(rounds, 40)
    full, empty = scene.canaries((1,) * 6, seed=14), nobody(scene.patients)
    faults, squares = [], np.zeros(len(sizes))
    for name, batch, count in (("patients", full, busy), ("nobody", empty, rounds)):
        exact, part = flat(quiet.gradient(batch)), np.zeros(len(sizes))
        for _ in range(count):
            part += _squares((flat(step.gradient(batch)) - exact) / sd, sizes)
        squares += part
        if not chi_square(part.sum(), count * sum(sizes)):
            ratio = math.sqrt(part.sum() / (count * sum(sizes)))
            faults.append(f"noise with {name} in the batch is {ratio:.4g} of the declared")
    total = (rounds + busy) * sum(sizes)
    if not abs(math.sqrt(squares.sum() / total) - 1) <= WITHIN:
        faults.append(f"noise is {math.sqrt(squares.sum() / total):.4g} of the declared")
    for (name, _), size, square in zip(model.named_parameters(), sizes, squares, strict=True):
        if not chi_square(square, (rounds + busy) * size, ALPHA / len(sizes)):
            faults.append(f"noise of {name} is {math.sqrt(square / (rounds + busy) / size):.4g} of the declared")
    return faults


def _squares(values: NDArray[np.float64], sizes: list[int]) -> NDArray[np.float64]:
    """Sum of squares of each tensor."""
    starts = np.cumsum([0, *sizes[:-1]])
    return np.asarray(np.add.reduceat(np.square(values), starts))


def chi_square(total: float, count: int, alpha: float = ALPHA) -> bool:
    """Whether a sum of squares can be that of standard normal numbers; wrongly denied with probability alpha."""
    low, high = stats.chi2.ppf([alpha / 2, 1 - alpha / 2], count)
    return bool(low * (1 - SLACK) <= total <= high * (1 + SLACK))


def _repeats(scene: Scene) -> list[str]:
    """Noise of two rounds, of a restarted site, and of a forked process: pairwise uncorrelated."""
    first, again = (scene.participant("twin") for _ in range(2))
    draws = first.real_draws()
    vectors = {
        "a round": _noise(scene, draws),
        "the next step": _noise(scene, draws),
        "another round": _noise(scene, first.real_draws(2)),
        "a restart": _noise(scene, again.real_draws()),
        "a fork": _in_fork(scene, draws),
        "the fork's parent": _noise(scene, draws),
    }
    faults = [f"{name} has no noise" for name, vector in vectors.items() if not vector.any()]
    if faults:
        return faults
    for one, other in itertools.combinations(vectors, 2):
        if not abs(_correlation(vectors[one], vectors[other])) < CORRELATED:
            faults.append(f"the noise of {one} comes again in {other}")
    for name, vector in vectors.items():
        if not abs(_correlation(vector[1:], vector[:-1])) < CORRELATED:
            faults.append(f"neighbouring numbers of {name} are correlated")
    return faults


def _correlation(left: NDArray[np.float64], right: NDArray[np.float64]) -> float:
    return float(left @ right) / math.sqrt(float(left @ left) * float(right @ right))


def _noise(scene: Scene, draws: Draws) -> NDArray[np.float64]:
    """What the step adds to zeros; small enough to be safe in a forked child."""
    step = scene.step(_Zeros(scene.plan.max_grad_norm), Scripted(draws))
    return flat(step.gradient(nobody(scene.patients.to(torch.device("cpu")))))


class _Zeros:
    """An engine of zeros."""

    def __init__(self, sensitivity: float) -> None:
        self.sensitivity = sensitivity

    def sum(self, batch: Batch, used: Tensor) -> Gradient:
        """Zeros."""
        del batch, used
        return {"zeros": torch.zeros(TWINS)}


def _in_fork(scene: Scene, draws: Draws) -> NDArray[np.float64]:
    """The noise of a child process that starts as a copy of this one."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            with os.fdopen(write, "wb") as out:
                out.write(_noise(scene, draws).tobytes())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as source:
        content = source.read()
    os.waitpid(child, 0)
    return np.frombuffer(content, np.float64)


def black_box(scene: Scene) -> tuple[Finding, float]:
    """Guess from releases which canaries took part.

    Returns:
        The finding; a lower bound of mu that holds with probability 1 - 2 ALPHA if releases are Gaussian.
    """
    model = scaled_model(scene, FAINT)
    quiet = silent_step(scene, model)
    spikes, directions = independent_canaries(scene, quiet)
    step = scene.step(quiet.engine, Scripted(scene.participant("box").real_draws()))
    inside, outside = _guesses(scene, step, spikes, directions)
    mu = mu_bound(inside, outside)
    claimed = 1 / scene.plan.noise_multiplier
    faults = [f"canaries give mu of at least {mu:.4g}, the event says {claimed:.4g}"] if mu > claimed else []
    if len(directions) == 0 or not len(inside):
        faults.append("no canary has a gradient of its own: nothing was tested")
    figures = {"mu": mu, "claimed": claimed, "canaries": float(len(directions)), "values": float(len(inside))}
    return finding("black box", faults, figures), mu


def _guesses(
    scene: Scene, step: Step, spikes: Batch, directions: NDArray[np.float64]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Whether each score was above the midpoint, for canaries inside and outside of the batch."""
    size = scene.plan.sample_rate * scene.plan.n_hat
    lengths = np.linalg.norm(directions, axis=1)
    coins = np.random.default_rng()
    guesses: dict[bool, list[NDArray[np.bool_]]] = {True: [], False: []}
    end, seen = time.monotonic() + BOX_SECONDS, 0
    while seen < 2 * SIDE and len(directions) and time.monotonic() < end:
        inside = coins.random(len(directions)) < 0.5
        release = flat(step.gradient(spikes.of_patients(torch.from_numpy(inside.nonzero()[0])))) * size
        above = directions @ release > lengths**2 / 2
        guesses[True].append(above[inside])
        guesses[False].append(above[~inside])
        seen += len(directions)
    return tuple(np.concatenate([*guesses[side], np.zeros(0, np.bool_)]) for side in (True, False))  # type: ignore[return-value]


def mu_bound(inside: NDArray[np.bool_], outside: NDArray[np.bool_]) -> float:
    """Lower bound of mu from true and false positives (Clopper and Pearson 1934, one-sided, `ALPHA` each)."""
    hits, alarms = int(inside.sum()), int(outside.sum())
    rate = stats.beta.ppf(ALPHA, hits, len(inside) - hits + 1) if hits else 0.0
    false = stats.beta.ppf(1 - ALPHA, alarms + 1, len(outside) - alarms) if alarms < len(outside) else 1.0
    if not 0 < rate <= 1 or not 0 <= false < 1:
        return 0.0
    return max(0.0, float(stats.norm.ppf(rate) - stats.norm.ppf(false)))


def independent_canaries(scene: Scene, step: Step, most: int = 32) -> tuple[Batch, NDArray[np.float64]]:
    """Canaries whose clipped gradients hardly overlap, each as long as the bound.

    Returns:
        The patients; [K, D] their un-noised contributions to a release times q n_hat.
    """
    chosen: list[Batch] = []
    rows: list[NDArray[np.float64]] = []
    size, bound = scene.plan.sample_rate * scene.plan.n_hat, scene.plan.max_grad_norm
    for spike in itertools.islice(_spikes(scene), 4 * most):
        row = flat(step.gradient(spike)) * size
        overlap = max((abs(float(row @ other)) for other in rows), default=0.0)
        if np.linalg.norm(row) > 0.9 * bound and overlap < 0.02 * bound**2:
            chosen.append(spike)
            rows.append(row)
        if len(rows) == most:
            break
    batch = nobody(scene.patients)
    for spike in chosen:
        batch = joined(batch, spike)
    return batch, np.array(rows).reshape(len(rows), -1)


def _spikes(scene: Scene) -> Iterator[Batch]:
    """Patients with one modality, and in it one strong entry."""
    blank = scaled(scene.canaries((1,), seed=15), 0.0)
    entries = {name: rows[0].numel() for name, rows in blank.inputs.items()}
    for at in range(max(entries.values())):
        for name in scene.held:
            if at >= entries[name]:
                continue
            rows = torch.zeros_like(blank.inputs[name])
            rows.view(-1)[at] = STRONG
            present = torch.zeros_like(blank.present)
            present[:, scene.study.order.index(name)] = True
            yield replace(blank, inputs={**blank.inputs, name: rows}, present=present)
