"""Part (c) of an audit: what an attacker makes of a site's releases."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from gapweave.client.audit_sensitivity import FAINT, STRONG, flat, scaled_model, silent_step
from gapweave.client.audit_site import Finding, Scene, Scripted, finding, joined, nobody, scaled
from gapweave.client.audit_tally import ALPHA
from gapweave.client.gradients.clipping import GROUPINGS, grouped
from gapweave.client.training import Step
from gapweave.shared.schema import Batch

SIDE = 8000
"""Values a side of the black box."""
BOX_SECONDS = 25.0
"""After this long the black box decides with the values that it has."""


def black_box(scene: Scene) -> tuple[Finding, float]:
    """Guess from releases which canaries took part.

    Returns:
        The finding; a lower bound of mu that holds with probability 1 - 2 ALPHA if releases are Gaussian.
    """
    model = scaled_model(scene, FAINT)
    quiet = silent_step(scene, model)
    spikes, directions = independent_canaries(scene, quiet)
    step = scene.step(quiet.engine, Scripted(scene.participant("box").learner.real_draws()))
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
    """Canaries whose clipped gradients hardly overlap, each as long as the bound of what is clipped together.

    Returns:
        The patients; [K, D] their un-noised contributions to a release times q n_hat, zero where canaries are alike.
    """
    chosen: list[Batch] = []
    rows: list[NDArray[np.float64]] = []
    groups = grouped(step.gradient(nobody(scene.patients)), GROUPINGS[scene.study.privacy.clipping])
    size, bound = scene.plan.sample_rate * scene.plan.n_hat, scene.plan.max_grad_norm / math.sqrt(len(groups))
    for spike in itertools.islice(_spikes(scene), 4 * most):
        row = _where_they_differ(step.gradient(spike), groups) * size
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


def _where_they_differ(gradient: Mapping[str, Tensor], groups: list[list[str]]) -> NDArray[np.float64]:
    """The gradient in groups that hold an encoder's parameters: in heads that are clipped alone, canaries are alike."""
    kept = {name for names in groups if any(name.startswith("encoders.") for name in names) for name in names}
    return flat({name: value if name in kept else torch.zeros_like(value) for name, value in gradient.items()})


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
