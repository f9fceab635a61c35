"""From a target epsilon and a schedule to the noise that keeps it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from gapweave.shared.config.site import Policy
from gapweave.shared.config.study import Study
from gapweave.shared.errors import UsageError
from gapweave.shared.privacy.accountant import fixed_epsilon
from gapweave.shared.privacy.events import LOOK, PrivacyEvent
from gapweave.shared.privacy.once import NO_LOOK, NOT_ALLOWED, look_events, preparation_events, table_event

COUNT_SHARE = 0.05
"""Share of the target epsilon that the once-only noisy number of training patients may cost."""
VALIDATION_FOLDS = 5
"""Folds of a site's training patients, by a keyed hash; those of the first do not take part in fine-tuning."""
SMALLEST_NOISE = 0.3
"""Noise multiplier below which less noise gains nothing."""
USUAL_DELTA = float(Policy.model_fields["delta"].default)
"""Delta of a site whose file sets none."""
LARGEST_NOISE = 1e4
"""Noise multiplier above which a target is called unreachable."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a site will train a study.

    Attributes:
        noise_multiplier: sigma of each step; 0 when privacy is off.
        sample_rate: q, probability with which a patient enters a step.
        n_hat: public number of training patients.
        steps: noised steps a round.
        rounds: rounds planned.
        finetune_steps: noised steps after the last upload, 0 for none.
        max_grad_norm: clipping bound C.
        epsilon: cost of the whole plan with its preparation; None when privacy is off.
        delta: at which epsilon holds.
        preparation: events that were charged before the plan was made.
        table: the release of the final model's scores, or None.
        no_table: why there is none.
        looks: releases of scores on the way, which may end the run early.
        no_looks: why there are none.
    """

    noise_multiplier: float
    sample_rate: float
    n_hat: int
    steps: int
    rounds: int
    finetune_steps: int
    max_grad_norm: float
    epsilon: float | None
    delta: float
    preparation: tuple[PrivacyEvent, ...] = ()
    table: PrivacyEvent | None = None
    no_table: str = ""
    looks: tuple[PrivacyEvent, ...] = ()
    no_looks: str = ""

    def schedule(self) -> list[PrivacyEvent]:
        """What a site reserves: all rounds, then fine-tuning, looks at the scores and the table of scores."""
        rounds = [self.event(f"update of round {number}") for number in range(1, self.rounds + 1)]
        finetuning = [self.event("fine-tuning", self.finetune_steps)] if self.finetune_steps else []
        return [*rounds, *finetuning, *self.looks, *([self.table] if self.table else [])]

    def scores(self, after: int | None) -> PrivacyEvent | str:
        """The release of scores after a round, or of the final model's; or why there is none.

        Args:
            after: number of the round; None for the final model.
        """
        if after is None:
            return self.table or self.no_table
        named = (event for event in self.looks if event.released == f"{LOOK} {after}")
        return next(named, self.no_looks or NO_LOOK)

    def event(self, released: str, steps: int | None = None) -> PrivacyEvent:
        """The event of one round, or of `steps` steps."""
        return PrivacyEvent(
            kind="dp_sgd" if self.noise_multiplier > 0 else "unnoised",
            released=released,
            noise_multiplier=self.noise_multiplier,
            sample_rate=self.sample_rate,
            steps=self.steps if steps is None else steps,
            max_grad_norm=self.max_grad_norm,
            n_hat=self.n_hat,
        )


def count_event(study: Study) -> PrivacyEvent:
    """The release of the number of training patients with discrete Laplace noise, once a study."""
    released = "number of training patients"
    if not study.privacy.enabled:
        return PrivacyEvent(kind="unnoised", released=released, noise_multiplier=0.0)
    scale = 1 / (COUNT_SHARE * study.privacy.epsilon)
    return PrivacyEvent(kind="noisy_count", released=released, noise_multiplier=scale)


def make_plan(
    study: Study, n_hat: int, delta: float, preparation: tuple[PrivacyEvent, ...] = (), *, tables: bool = True
) -> Plan:
    """Calibrate the noise so that preparation, all rounds and all tables of scores together cost the study's target.

    Args:
        study: gives target, clipping bound and schedule.
        n_hat: public number of training patients.
        delta: at which the target holds at this site.
        preparation: events already charged for this study.
        tables: whether the site releases counts.

    Raises:
        UsageError: when no noise up to `LARGEST_NOISE` reaches the target.
    """
    training, privacy = study.training, study.privacy
    rate = 1.0 if training.schedule == "fedsgd" else min(1.0, training.batch / n_hat)
    finetune = training.finetune_steps if training.finetune else 0
    each = training.steps_for(n_hat)
    steps = training.rounds * each + finetune
    table = table_event(study, n_hat) if tables else NOT_ALLOWED
    looks = look_events(study, n_hat) if tables else NOT_ALLOWED
    scores = (*(() if isinstance(looks, str) else looks), *(() if isinstance(table, str) else (table,)))
    beside = (*preparation, *scores)
    plan = Plan(
        noise_multiplier=_calibrate(privacy.epsilon, delta, rate, steps, beside) if privacy.enabled else 0.0,
        sample_rate=rate,
        n_hat=n_hat,
        steps=each,
        rounds=training.rounds,
        finetune_steps=finetune,
        max_grad_norm=privacy.max_grad_norm,
        epsilon=None,
        delta=delta,
        preparation=preparation,
        table=None if isinstance(table, str) else table,
        no_table=table if isinstance(table, str) else "",
        looks=() if isinstance(looks, str) else looks,
        no_looks=looks if isinstance(looks, str) else "",
    )
    if not privacy.enabled:
        return plan
    return replace(plan, epsilon=fixed_epsilon([*beside, plan.event("plan", steps)], delta))


def usual_plan(
    study: Study,
    n_hat: int,
    delta: float = USUAL_DELTA,
    held: Sequence[str] | None = None,
    *,
    tables: bool = True,
) -> Plan:
    """The plan of a site that declares its number of patients.

    Args:
        study: gives target, clipping bound and schedule.
        n_hat: public number of training patients.
        delta: of the site; the study's counts where it is smaller.
        held: modalities of the site; None for all.
        tables: whether the site releases counts.

    Raises:
        UsageError: when no noise reaches the target.
    """
    least = min(study.privacy.delta, delta)
    held = study.order if held is None else held
    return make_plan(study, n_hat, least, preparation_events(study, held, least), tables=tables)


def _calibrate(target: float, delta: float, rate: float, steps: int, beside: tuple[PrivacyEvent, ...]) -> float:
    """The smallest noise multiplier, to 4 digits and rounded up, whose cost is at most the target."""
    from scipy.optimize import brentq

    def excess(log_sigma: float) -> float:
        event = PrivacyEvent(
            kind="dp_sgd",
            released="plan",
            noise_multiplier=math.exp(log_sigma),
            sample_rate=rate,
            steps=steps,
        )
        return fixed_epsilon([*beside, event], delta) - target

    high = math.log(2.0)
    while excess(high) > 0:
        high += 1.5
        if high > math.log(LARGEST_NOISE):
            raise UsageError(
                f"epsilon {target:g} cannot be reached with {steps} steps at sampling rate {rate:.3g}",
                where="study:privacy.epsilon",
                remedy="Raise epsilon, or plan fewer rounds",
            )
    low = high - 1.5
    while excess(low) <= 0:
        low, high = low - 1.5, low
        if high <= math.log(SMALLEST_NOISE):
            return SMALLEST_NOISE
    return _round_up(math.exp(brentq(excess, low, high, xtol=1e-3) + 1e-3))


def _round_up(value: float) -> float:
    scale = 10.0 ** (3 - math.floor(math.log10(value)))
    return math.ceil(value * scale) / scale


def longest_prefix(events: Sequence[PrivacyEvent], fits: Callable[[Sequence[PrivacyEvent]], bool]) -> int:
    """Length of the longest prefix that fits; most studies fit as a whole, which is looked at first."""
    low, high, middle = 0, len(events), len(events)
    while low < high:
        low, high = (middle, high) if fits(events[:middle]) else (low, middle - 1)
        middle = (low + high + 1) // 2
    return low


def noise_of_steps(study: Study, steps: int, sd: float) -> float:
    """Standard deviation of the noise in each parameter after plain local steps; each shrinks what earlier ones did.

    Args:
        study: gives the learning rate and what pulls parameters back.
        steps: how many.
        sd: of the noise in each coordinate of a step's mean gradient.
    """
    training = study.training
    left = 1 - training.lr * (study.shrinkage + training.proximal)
    return training.lr * sd * math.sqrt(sum(left ** (2 * later) for later in range(steps)))
