"""Before a run: can joining help a site at this budget? From declared sizes and the privacy plan only.

*The rule.* Training estimates d parameters. Alone, a site with n patients does so with the error of its sample, in each
coordinate of the mean gradient a variance of v / n. In the mean of H sites there are more patients and H noises:

    v / H^2 sum_j 1 / n_j  +  C^2 / H^2 sum_j (sigma_j / n_j)^2

sigma_j is the noise multiplier of the whole training as if it were one release of all patients, sigma / (q sqrt(T)) for
T steps at sampling rate q. Joining can help where this is less than v / n. With v = C^2 / (t d): the typical gradient
is sqrt(t) times shorter than the clipping bound. t is `TYPICAL`, calibrated on measured runs, whose evidence and limits
are in docs/decisions/0019-joining.md; where linear paths read rows of one norm, lengths are known and t follows from
them (`typical`). For equal sites the rule reads: the patients of the others must be more than t d sigma^2.

It knows nothing of how alike the sites are, and compares with a model of the same form: a warning, never a refusal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from gapweave.shared.config.study import Study
from gapweave.shared.model import MultimodalModel, groups, shared_groups
from gapweave.shared.privacy.plan import Plan, usual_plan

TYPICAL = 10.0
"""Squared ratio of the clipping bound to the root mean square norm of a patient's gradient."""
MOST_SITES = 1000
"""A number of sites above which nobody is asked to wait for it."""
SMALL_COHORT = 1000
"""Training patients below which one gradient of all of them a round did better than local steps, without noise."""


def shared_parameters(study: Study) -> int:
    """d: parameters that leave a site which holds every modality."""
    initial = groups(MultimodalModel(study, study.order))
    return sum(value.numel() for group in shared_groups(study, initial) for value in initial[group].values())


def whole_noise(plan: Plan) -> float:
    """Sigma of the whole training as one release of all patients."""
    steps = plan.rounds * plan.steps
    return plan.noise_multiplier / (plan.sample_rate * math.sqrt(steps))


def typical(study: Study) -> float:
    """t: squared ratio of the clipping bound to a patient's gradient, from 1, where most are clipped, to `TYPICAL`.

    Rows of one norm, averaged over M modalities, make a record of norm / sqrt(M); its error is about 1/2.
    """
    if study.model.feature_norm is None:
        return TYPICAL
    length = study.model.feature_norm / (2 * math.sqrt(len(study.modalities)))
    return min(max(1.0, (study.privacy.max_grad_norm / length) ** 2), TYPICAL)


def error_ratio(plan: Plan, others: list[Plan], parameters: int, ratio: float = TYPICAL) -> float:
    """Variance of the joint estimate over that of the site alone; joining can help below 1.

    Args:
        plan: of the site.
        others: plans of the other sites.
        parameters: d.
        ratio: t.
    """
    every = [plan, *others]
    sampling = sum(1 / each.n_hat for each in every)
    noise = ratio * parameters * sum((whole_noise(each) / each.n_hat) ** 2 for each in every)
    return plan.n_hat * (sampling + noise) / len(every) ** 2


def sites_needed(plan: Plan, parameters: int, ratio: float = TYPICAL) -> int:
    """Sites of this one's size, itself among them, from which on joining can help."""
    return 1 + math.floor(1 + ratio * parameters * whole_noise(plan) ** 2 / plan.n_hat)


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What can be expected of a study at one site.

    Attributes:
        site: its name.
        patients: public number of its training patients.
        ratio: `error_ratio`.
        needed: `sites_needed`.
        sites: sites that were counted.
        parameters: d.
        noise: `whole_noise`.
        epsilon: the study's.
    """

    site: str
    patients: int
    ratio: float
    needed: int
    sites: int
    parameters: int
    noise: float
    epsilon: float

    @property
    def helps(self) -> bool:
        """Whether joining can be expected to help."""
        return self.ratio < 1

    def __str__(self) -> str:
        """In words, with the reason."""
        budget = (
            f"{self.parameters} shared parameters under noise of epsilon {self.epsilon:g} (whole-training multiplier "
            f"{self.noise:.2g}) have {self.ratio:.2g} times the variance of the site's {self.patients} patients alone"
        )
        if self.helps:
            return f"this study can help {self.site}: with {self.sites} sites, {budget}"
        few = self.needed <= MOST_SITES
        enough = f"it would take {self.needed} sites of this size" if few else "no number of sites would do"
        return (
            f"this study cannot be expected to help {self.site} at this budget, because with {self.sites} sites "
            f"{budget}; {enough}. Share fewer parameters, spend more epsilon, or use a public score with a local model"
        )


def outlooks(study: Study, sizes: Mapping[str, int]) -> list[Outlook]:
    """What can be expected at each of a study's sites.

    Args:
        study: with privacy on; without it there is no noise to speak of, and the answer is empty.
        sizes: declared training patients by site.
    """
    if not study.privacy.enabled:
        return []
    plans, parameters = {name: usual_plan(study, size) for name, size in sizes.items()}, shared_parameters(study)
    ratio = typical(study)
    return [
        Outlook(
            site=name,
            patients=plan.n_hat,
            ratio=error_ratio(plan, [other for of, other in plans.items() if of != name], parameters, ratio),
            needed=sites_needed(plan, parameters, ratio),
            sites=len(plans),
            parameters=parameters,
            noise=whole_noise(plan),
            epsilon=study.privacy.epsilon,
        )
        for name, plan in plans.items()
    ]


def alone_warning(study: Study, plan: Plan) -> str | None:
    """What a single site can say before a run, which does not know the others: how many of its size it takes.

    Args:
        study: of the plan.
        plan: the site's own.

    Returns:
        None where the study's quorum is enough.
    """
    parameters = shared_parameters(study)
    needed = sites_needed(plan, parameters, typical(study))
    if needed <= max(2, study.aggregation.quorum):
        return None
    few = (
        f"unless at least {needed} sites of this size take part" if needed <= MOST_SITES else "with any number of sites"
    )
    return (
        f"This study cannot be expected to help this site at this budget {few}, because {parameters} shared parameters "
        f"get noise of each site's own, which outweighs what fewer sites add to its {plan.n_hat} patients. Consider a "
        "public score with a local model."
    )


def schedule_advice(study: Study, patients: int) -> tuple[str, str]:
    """The schedule that fits declared sizes and plan, and the reason.

    Args:
        study: the plan's.
        patients: declared training patients of a typical site.

    Returns:
        `fedavg` or `fedsgd`, and why.
    """
    if not study.privacy.enabled:
        if patients < SMALL_COHORT:
            return "fedsgd", (
                f"with about {patients} patients a site, one gradient of all patients a round, followed by a server "
                "Adam (aggregation.server_optimizer) for 40 to 100 rounds, did better than local steps: recipe=small"
            )
        return "fedavg", f"with about {patients} patients a site, local steps save rounds and bytes"
    now = usual_plan(study, patients)
    steps = now.rounds * now.steps
    whole = study.training.model_copy(update={"batch": patients})
    full = whole_noise(usual_plan(study.model_copy(update={"training": whole}), patients))
    return "fedsgd", (
        f"{steps} gradients of all {patients} patients carry noise of {full:.2g} over the whole training at this "
        f"epsilon, {steps} steps of the study's batch carry {whole_noise(now):.2g}; of a linear model whose modalities "
        "are heard alike (model.feature_norm): recipe=linear"
    )
