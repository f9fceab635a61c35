"""Does a study fit this installation, and itself? Asked before any work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from statistics import median
from typing import Any

from gapweave.client.forecast import forecast
from gapweave.client.trial import try_model
from gapweave.server.aggregation import initial_groups
from gapweave.server.rules import left_alone, resolve, rule_for
from gapweave.shared.config import Site, Study
from gapweave.shared.config.training import Training
from gapweave.shared.encoders import ENCODERS
from gapweave.shared.errors import UsageError
from gapweave.shared.features.numeric import SCALE_IT, numeric_columns
from gapweave.shared.fusion import FUSIONS, chosen_fusion
from gapweave.shared.imputers import IMPUTERS, build_imputer
from gapweave.shared.model import MultimodalModel, groups
from gapweave.shared.outlook import outlooks, schedule_advice
from gapweave.shared.privacy.plan import USUAL_DELTA
from gapweave.shared.privacy.plan_report import weakness
from gapweave.shared.registry import Registry
from gapweave.shared.schema import modalities
from gapweave.shared.schemes import SCHEMES, build_scheme


def check_study(study: Study, sites: Iterable[Site]) -> list[UsageError]:
    """All that can be found wrong with a study without data, before a site pays for it.

    Args:
        study: as it was read.
        sites: all that will take part, as far as they are known.

    Returns:
        Why some groups would be left alone in every round.

    Raises:
        UsageError: naming the key; also where all groups would be left alone.
    """
    check_names(study)
    there = list(sites)
    _require_honest(study, len(there))
    held = holders_of(study, there)
    alone = [
        UsageError(error.what, where=error.where, remedy=error.remedy)
        for error in left_alone(study.aggregation, held).values()
    ]
    if alone and len(alone) == len(held):
        raise alone[0]
    try_model(study, study.order)
    return alone


def _require_honest(study: Study, sites: int) -> None:
    """Refuse a simulation in which every site is bad: nobody's model would be judged."""
    bad = study.simulation.bad_sites
    if study.simulation.attack != "none" and 0 < sites <= bad:
        raise UsageError(
            f"{bad} bad sites of {sites} leave no honest one",
            where="study:simulation.bad_sites",
            remedy=f"Let at most {sites - 1} be bad, or add site files",
        )


def check_names(study: Study) -> None:
    """Resolve every registered name of a study before any work.

    Raises:
        UsageError: naming the key and the installed names; for a fusion that cannot serve the study, why not.
    """
    named: list[tuple[str, str | None, Registry[Any]]] = [
        ("model.fusion", study.model.fusion, FUSIONS),
        ("model.imputer", study.model.imputer, IMPUTERS),
        ("scheme.name", study.scheme.name, SCHEMES),
        *((f"modalities.{name}.encoder", spec.encoder, ENCODERS) for name, spec in study.modalities.items()),
    ]
    for key, name, registry in named:
        if name is None:
            continue
        with _at(key):
            registry[name]
    chosen_fusion(study)
    build_imputer(study)
    build_scheme(study)
    for key, rule in {"default": study.aggregation.default, **study.aggregation.rules}.items():
        with _at(f"aggregation.{key}"):
            resolve(rule_for(rule, 1))


@contextmanager
def _at(key: str) -> Iterator[None]:
    """Say at which key of the study a name stands that is not installed."""
    try:
        yield
    except UsageError as error:
        raise UsageError(error.what, where=f"study:{key}{error.where.replace(':', '.')}", remedy=error.remedy) from None


def holders_of(study: Study, sites: Iterable[Site]) -> dict[str, int]:
    """How many of the sites hold each shared group that any of them holds.

    Raises:
        UsageError: for a study that shares none.
    """
    held = [site.held(study) for site in sites]
    modality = {group: group.partition("/")[2] for group in initial_groups(study)}
    if not modality:
        raise UsageError(
            "every group stays at the sites: nothing would be trained jointly",
            where="study:sharing",
            remedy="Share at least the fusion heads (sharing: heads)",
        )
    counts = {group: sum(not name or name in names for names in held) for group, name in modality.items()}
    return {group: count for group, count in counts.items() if count}


def _schedule(training: Training) -> str:
    each = f"{training.local_steps} steps" if training.passes is None else f"{training.passes:g} passes"
    stop = training.early_stop
    early = f", or fewer: {len(training.looks)} looks at the scores, epsilon {stop.epsilon:g} in all" if stop else ""
    return f"{training.rounds} rounds of {each}{early}"


def describe(study: Study) -> dict[str, str]:
    """What a reader wants to know of a study before running it: id -> one line."""
    shared = initial_groups(study)
    every = groups(MultimodalModel(study, study.order))
    size = sum(value.nbytes for part in shared.values() for value in part.values())
    privacy = study.privacy
    shapes = ", ".join(f"{modality.name} {list(modality.shape)}" for modality in modalities(study))
    return {
        "hash": study.sha256,
        "task": f"{study.task.kind}, {', '.join(study.task.labels)}",
        "inputs": shapes,
        "shared": f"{', '.join(shared)}: {size / 1e6:.2f} MB up and down a site and round at most, "
        f"{study.training.rounds * size / 1e6:.2f} MB in all",
        "local": ", ".join(sorted(every.keys() - shared.keys())) or "nothing",
        "schedule": _schedule(study.training),
        "privacy": (
            f"epsilon {privacy.epsilon:g} at delta {privacy.delta:g}, patient-level, per site"
            if privacy.enabled
            else "OFF: sites must allow it, and no guarantee holds"
        ),
    }


STEEP = 10.0
"""How many times the largest step by which the loss of a linear model surely falls is called too large."""


def _overshoots(study: Study) -> bool:
    """Whether plain steps are far longer than gradients of features of this length allow.

    The log-loss of a linear model of features of length F bends by F^2 / 4 at most: below 8 / F^2 no step overshoots.
    """
    length, training, aggregation = study.model.feature_norm, study.training, study.aggregation
    if study.privacy.enabled or not length or aggregation.server_optimizer != "none":
        return False
    return training.lr * aggregation.server_lr > STEEP * 8 / length**2


ASSUMED = 500
"""Patients of a site, where none declares a number."""
MOST_NAMED = 8
"""Variables that one line names."""


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:MOST_NAMED]) + (", ..." if len(names) > MOST_NAMED else "")


def foretell(study: Study, sites: Sequence[Site]) -> Iterator[tuple[str, str, str]]:
    """What can be expected of a study, and at its sites from their declared sizes: (status, id, one line)."""
    if study.privacy.enabled and (weak := weakness(study.privacy.epsilon)):
        yield "warning", "epsilon", weak
    usual = max((site.delta for site in sites), default=USUAL_DELTA)
    if study.privacy.enabled and study.privacy.delta > usual:
        said = f"sites plan with their own delta, {usual:g} or less, and not with the study's {study.privacy.delta:g}"
        yield "warning", "delta", said
    quorum = study.aggregation.quorum
    if 0 < len(sites) < quorum:
        few = f"a round needs {quorum} sites, and there are {len(sites)} site files here: is that all?"
        yield "warning", "quorum", few
    unscaled = [f"{one.modality}.{one.name}" for one in numeric_columns(study, study.order) if not one.scaled]
    if unscaled and study.preparation.standardisation == "public":
        why = "a quarter of the range counts as 1, and training hardly sees values that vary by much less"
        yield "warning", "scaling", f"{_few(unscaled)} without scale: {why}. {SCALE_IT}"
    if _overshoots(study):
        why = "without privacy nothing clips gradients, and steps of this rate suit clipped ones: training may diverge"
        yield "warning", "rate", f"{why}. Lower aggregation.server_lr, or take recipe=small"
    sizes = {site.name: site.patients.declared for site in sites if site.patients.declared is not None}
    with suppress(UsageError):  # no noise reaches the target at a size that is assumed
        yield "ok", "cost", str(forecast(study, max(sizes.values(), default=ASSUMED)))
    if not sizes:
        return
    if len(sizes) < len(sites):
        unknown = ", ".join(sorted(site.name for site in sites if site.name not in sizes))
        yield "ok", "outlook", f"foretold without {unknown}, who do not declare a size (patients.declared)"
    for outlook in outlooks(study, sizes):
        yield "ok" if outlook.helps else "warning", "outlook", str(outlook)
    advised, why = schedule_advice(study, round(median(sizes.values())))
    planned = study.training.schedule
    yield "ok" if advised == planned else "warning", "schedule advice", f"{advised} ({planned} is planned): {why}"
