"""The one-run audit: one training run with half of many canaries in it, and a guess about each of them.

It runs the real participant, step, engine, draws and ledger on canaries only, never on patients, at a small claimed
epsilon. Guessing right more often than that epsilon allows shows that the claim is wrong, whatever the fault.

Guarantee: of a correct site, `lower_bound` is above the true epsilon with probability at most `ALPHA`.

Edge cases: the bound cannot exceed `ceiling(...)` even if every guess is right; a claim from there on is never
contradicted, and the finding says so.

Reference: Steinke, Nasr, Jagielski 2023, arXiv 2305.08846, theorem 5.2.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import optimize, stats

from gapweave.client.audit_sensitivity import FAINT, STRONG, flat, scaled_model, silent_step
from gapweave.client.audit_site import RUN, CanarySite, Finding, Scene, audit_copy, finding, scaled
from gapweave.client.canaries import canaries
from gapweave.client.state import to_arrays
from gapweave.shared.config.site import Site
from gapweave.shared.config.study import Study
from gapweave.shared.model import groups
from gapweave.shared.privacy.ledger import read_ledger
from gapweave.shared.schema import Batch
from gapweave.shared.tensorfile import Arrays

COLUMNS = 400
"""Table columns of the audit's own study; each gives two canaries: its value, and that it was observed."""
ROUNDS = 4
"""Rounds of one step, in which everyone takes part."""
DELTA = 1e-9
"""Delta of the claim: at 1e-5 the test may be wrong more often than `ALPHA` even if every guess is right."""
ALPHA = 5e-7
"""Probability that a correct site's bound is above its epsilon."""
SHARES = (0.1, 0.25, 0.5, 1.0)
"""Shares of the canaries that are guessed about, the surest first; the bound is corrected for trying them all."""


def one_run(study: Study, site: Site, folder: Path, epsilon: float) -> Finding:
    """Train once on canaries at a claimed epsilon, and try to contradict it.

    Args:
        study: gives privacy and its engine.
        site: the hospital's file.
        folder: for the ledger of the audit.
        epsilon: to claim.

    Returns:
        The finding; figures `claimed` (from the ledger), `lower_bound`, `confidence`, `ceiling`, `canaries`.
    """
    scene = _stage(study, site, folder, epsilon)
    inside = np.random.default_rng().random(scene.patients.patients) < 0.5
    here = scene.participant("one-run", scene.patients.of_patients(torch.from_numpy(inside.nonzero()[0])))
    model = scaled_model(scene, FAINT)
    total = _releases(here, to_arrays(groups(model)))
    right = _right_guesses(_scores(_directions(scene), total), inside)
    claimed = read_ledger(here.state).spent()
    bound, top = epsilon_bound(right, scene.plan.delta), ceiling(len(inside), scene.plan.delta)
    figures = {"claimed": claimed, "lower_bound": bound, "ceiling": top, "canaries": float(len(inside))}
    figures["confidence"] = 1 - ALPHA
    faults = [f"guesses show epsilon of at least {bound:.3g}, the ledger says {claimed:.3g}"] if bound > claimed else []
    if claimed >= top and not faults:
        text = f"proves nothing at epsilon {claimed:.3g}: {len(inside)} right guesses would show {top:.3g}; claim less"
        return replace(finding("one run", [], figures), text=text)
    return finding("one run", faults, figures)


def _stage(study: Study, site: Site, folder: Path, epsilon: float) -> Scene:
    """A study of one wide table, the site as it would be in it, and as many canaries as the table has entries."""
    content = study.model_dump(mode="json")
    columns = {f"c{at}": {"low": 0, "high": 1} for at in range(COLUMNS)}
    content |= {
        "modalities": {"probe": {"kind": "table", "columns": columns}},
        "task": {"kind": "binary", "label": "canary"},
        "model": {"embedding": 4, "fusion": "late", "imputer": "none"},
        "scheme": {"name": "none"},
        "sharing": {"policy": "all"},
        "training": {"rounds": ROUNDS, "local_steps": 1, "batch": COLUMNS, "lr": 1.0},
    }
    content["privacy"] |= {"epsilon": epsilon, "delta": DELTA}
    probe = Study.model_validate(content)
    data = site.data.model_copy(update={"modalities": {"probe": next(iter(site.data.modalities.values()))}})
    declared = site.patients.model_copy(update={"declared": COLUMNS})
    policy = site.policy.model_copy(update={"delta": DELTA})
    small = site.model_copy(update={"data": data, "patients": declared, "policy": policy})
    copy = audit_copy(probe, small, COLUMNS // 2)
    patients = _spikes(probe)
    draft = CanarySite(probe, copy, state=folder / "one-run-plan", batch=patients)
    with draft.ledger() as ledger:
        plan = draft._plan(ledger, RUN)
    return Scene(study=probe, site=copy, folder=folder, patients=patients.to(draft.device), plan=plan)


def _spikes(study: Study) -> Batch:
    """One canary for each entry of the table, strong in it and zero elsewhere."""
    batch = scaled(canaries(study, ["probe"], (1,) * (2 * COLUMNS)), 0.0)
    return replace(batch, inputs={"probe": STRONG * torch.eye(2 * COLUMNS)}, target=torch.ones_like(batch.target))


def _releases(site: CanarySite, start: Arrays) -> NDArray[np.float64]:
    """The sum of what a site sends to a server that asks about the same model again and again."""
    site.prepare(RUN)
    order, total = groups(site.learner.model), np.zeros(0)
    for number in range(1, ROUNDS + 1):
        reply = site.train(RUN, number, f"one run, round {number}", start).reply
        update = np.concatenate([reply[group][name].ravel() for group in order for name in order[group]])
        total = -update.astype(np.float64) if number == 1 else total - update
    return total


def _directions(scene: Scene) -> NDArray[np.float32]:
    """[K, D]: the un-noised gradient of each canary alone."""
    step = silent_step(scene, scaled_model(scene, FAINT))
    alone = (scene.patients.of_patients(torch.tensor([at])) for at in range(scene.patients.patients))
    return np.array([flat(step.gradient(one)).astype(np.float32) for one in alone])


def _scores(directions: NDArray[np.float32], total: NDArray[np.float64]) -> NDArray[np.float64]:
    """How much of each canary is in a sum: least squares, since their gradients share what is not their own."""
    gram = (directions @ directions.T).astype(np.float64)
    gram += 0.1 * np.diag(gram).mean() * np.eye(len(gram))
    return np.asarray(np.linalg.solve(gram, directions @ total))


def _right_guesses(scores: NDArray[np.float64], inside: NDArray[np.bool_]) -> dict[int, int]:
    """Right guesses by number of guesses: the highest scores are said to be inside, the lowest outside."""
    order = np.argsort(scores)
    return {
        guesses: int((~inside[order[: guesses // 2]]).sum() + inside[order[-(guesses // 2) :]].sum())
        for guesses in _guesses(len(scores))
    }


def epsilon_bound(right: dict[int, int], delta: float, canaries: int = 2 * COLUMNS) -> float:
    """The largest epsilon that so many right guesses contradict, for the best number of guesses.

    Args:
        right: right guesses by number of guesses.
        delta: of the claim.
        canaries: that a coin was thrown for.
    """
    share = ALPHA / len(right)
    bounds = [0.0]
    for guesses, hits in right.items():
        if p_value(0.0, guesses, hits, delta, canaries) <= share:
            found = optimize.brentq(lambda e, g=guesses, h=hits: p_value(e, g, h, delta, canaries) - share, 0.0, 40.0)
            bounds.append(float(found))
    return max(bounds)


def ceiling(count: int, delta: float) -> float:
    """What the bound is when every guess is right."""
    return epsilon_bound({guesses: guesses for guesses in _guesses(count)}, delta, count)


def _guesses(count: int) -> list[int]:
    return [2 * max(1, int(share * count / 2)) for share in SHARES]


def p_value(epsilon: float, guesses: int, right: int, delta: float, canaries: int) -> float:
    """Probability that so many guesses are right at most, if the training is (epsilon, delta) private."""
    if right == 0:
        return 1.0
    chance = 1 / (1 + np.exp(-epsilon))
    above = stats.binom.sf(right - 1, guesses, chance)
    fewer = np.cumsum(stats.binom.pmf(np.arange(right - 1, -1, -1), guesses, chance))
    slope = float((fewer / np.arange(1, right + 1)).max())
    return float(min(1.0, above + 2 * canaries * delta * slope))
