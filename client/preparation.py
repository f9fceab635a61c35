"""What a site learns about its own data before it trains: released once a study with noise, or fixed and public.

Guarantee: each release is charged before anything is computed for it, and its noised value is kept in the ledger: a
resume, or another run of the same study, uses it again at no cost. What the model is given is computed from these
values and the study alone. The un-noised sums change, when one patient joins or leaves, by at most the event's declared
sensitivity, whatever the patient's records hold: values are clipped, what is no number counts as absent, and a
patient's records share one weight of 1.

| edge case                              | what the site uses                                        |
|----------------------------------------|-----------------------------------------------------------|
| a column that too few patients have    | the study's center and scale                              |
| a spread near 0, or a huge one         | one within `SPREADS`; a smaller one as far as noise lets   |
| a noised count of labels below 0       | `SMALLEST_SHARE` of its class                             |
| privacy off                            | the same values without noise, charged as un-noised       |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from gapweave.client.ledger import Ledger
from gapweave.client.policy import check_counts, check_size
from gapweave.shared.config import Site, Study
from gapweave.shared.constants import SPREADS, Constants, Rescaling
from gapweave.shared.features.numeric import NumericColumn, numeric_columns
from gapweave.shared.privacy.draws import SecretDraws, discrete_laplace
from gapweave.shared.privacy.events import PrivacyEvent
from gapweave.shared.privacy.noise import on_grid, secret_normals
from gapweave.shared.privacy.once import balance_event, preparation_events, statistics_event
from gapweave.shared.privacy.plan import Plan, count_event, make_plan
from gapweave.shared.schema import Batch

FINEST = 0.01
"""Smallest spread without noise: a column that does not vary has none."""
SURE = 0.25
"""Largest standard deviation of a mean's noise, in the study's scale, with which a site uses the mean."""
SMALLEST_SHARE = 0.01
"""Smallest share of a class that a prior may have."""


class Preparation:
    """The charged releases of one site and study, and what its model makes of them.

    Args:
        study: says what is released.
        site: the hospital's file.
        held: modalities of the site.
        delta: of the plan.
    """

    def __init__(self, study: Study, site: Site, held: Sequence[str], delta: float) -> None:
        self._study, self._site, self._held, self._delta = study, site, held, delta
        self.events = preparation_events(study, held, delta)

    def require_room(self, ledger: Ledger, run: str) -> None:
        """Refuse a study of which not one round fits, before anything is charged for it.

        Until the number of patients is released, a round has to fit at the most or at the fewest that the site may
        have, which are public: a study of few rounds may pass here, and be refused at the true number.

        Args:
            ledger: of the site.
            run: that asks first.

        Raises:
            BudgetExhausted: when nothing fits.
            UsageError: when no noise reaches the study's target.
        """
        known = self._site.patients.declared or self._counted(ledger)
        sizes = (known,) if known else (self._site.patients.upper, max(1, self._site.policy.min_patients))
        counted = () if self._site.patients.declared else (count_event(self._study),)
        unpaid = ledger.unpaid(self._study.sha256, [*counted, *self.events])
        schedules = [self.plan(patients, counted).schedule() for patients in sizes]
        if not any(ledger.affords(run, self._study.sha256, [*unpaid, rounds[0]]) for rounds in schedules):
            raise ledger.no_room(run, [*unpaid, *schedules[0]])

    def plan(self, patients: int, counted: tuple[PrivacyEvent, ...]) -> Plan:
        """The site's plan for a public number of patients.

        Args:
            patients: the number.
            counted: the event that releases it, if one does.
        """
        paid = (*counted, *self.events) if self._study.privacy.enabled else self.events
        return make_plan(self._study, patients, self._delta, paid, tables="counts" in self._site.policy.releases)

    def _counted(self, ledger: Ledger) -> int:
        """The number of patients as it was released; 0 if it was not."""
        found = ledger.released_once(self._study.sha256, count_event(self._study))
        return 0 if found is None else max(1, int(found[0]))

    def patients(self, ledger: Ledger, run: str, training: Callable[[], Batch]) -> tuple[int, tuple[PrivacyEvent, ...]]:
        """The public number of training patients, and the event that released it, if one did.

        Args:
            ledger: of the site.
            run: that asks first.
            training: gives the training patients.

        Raises:
            RefusedError: when the site has too few, or releases no counts.
            BudgetExhausted: when its cap leaves no room.
        """
        if self._site.patients.declared is not None:
            return self._site.patients.declared, ()
        event = count_event(self._study)
        check_counts(self._site, "`patients.declared` is not set: the number of patients would be counted")
        if not self._counted(ledger):
            check_size(training().patients, self._site)  # a study that is too large for the site costs it nothing
        ledger.once(run, self._study.sha256, event, lambda: noised_counts([training().patients], event))
        return self._counted(ledger), (event,)

    def constants(self, ledger: Ledger, run: str, training: Callable[[], Batch]) -> Constants:
        """The constants of the site's model; what was not released before is released now.

        Args:
            ledger: of the site.
            run: that asks first.
            training: gives the training patients; called only after the charge.

        Raises:
            RefusedError: when the site releases no counts.
            BudgetExhausted: when its cap leaves no room.
        """
        if self.events:
            check_counts(self._site, "the study asks for noised statistics of the training patients")

        def counts() -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
            event = balance_event(self._study)
            found = ledger.once(
                run,
                self._study.sha256,
                event,
                lambda: noised_counts(label_counts(self._study, training()).flatten().tolist(), event),
            )
            return np.array(found).reshape(event.steps, -1)

        def sums(columns: Sequence[NumericColumn]) -> tuple[Tensor, float]:
            event = statistics_event(self._study, self._held, self._delta)
            noise = event.noise_multiplier * event.max_grad_norm
            found = ledger.once(
                run, self._study.sha256, event, lambda: noised_sums(column_sums(columns, training()), noise)
            )
            return torch.tensor(found, dtype=torch.float64).view(3, -1), noise

        return _constants(self._study, self._held, counts, sums)


def own_constants(study: Study, held: Sequence[str], data: Batch) -> Constants:
    """The constants without noise, for models that a site trains for itself: nothing of them leaves.

    Args:
        study: says which there are.
        held: modalities of the site.
        data: its training patients.
    """
    return _constants(
        study,
        held,
        lambda: label_counts(study, data).double().cpu().numpy(),
        lambda columns: (column_sums(columns, data), 0.0),
    )


def _constants(
    study: Study,
    held: Sequence[str],
    counts: Callable[[], np.ndarray[tuple[int, ...], np.dtype[np.float64]]],
    sums: Callable[[Sequence[NumericColumn]], tuple[Tensor, float]],
) -> Constants:
    """What a study tells a site's model; counts of labels, and sums with their noise, are made where it needs them."""
    asked, kind = study.preparation.class_balance, study.task.kind
    offset: tuple[float, ...] = ()
    if asked != "none":
        offset = log_odds(asked if isinstance(asked, list) else shares(counts(), kind), kind)
    columns = numeric_columns(study, held)
    if study.preparation.standardisation == "public" or not columns:
        return Constants(offset=offset)
    return Constants(offset=offset, rescaling=rescaling(columns, *sums(columns)))


# Class balance.


def label_counts(study: Study, data: Batch) -> Tensor:
    """[tables, classes] int64: patients by the label of their first record that has one.

    One table for binary (0, 1) and multiclass; for multilabel one table (0, 1) a label.
    """
    if study.task.kind == "multiclass":
        first = first_records(data, data.label_mask[:, 0])
        return data.target[first].bool().sum(0, keepdim=True)
    tables = []
    for label in range(study.task.outputs):
        first = first_records(data, data.label_mask[:, label])
        positive = (data.target[first, label] > 0.5).sum()
        tables.append(torch.stack([len(first) - positive, positive]))
    return torch.stack(tables)


def first_records(data: Batch, eligible: Tensor) -> Tensor:
    """Row of each patient's first eligible record, in the order of the site's file; patients without one left out."""
    rows = eligible.nonzero()[:, 0]
    patient = data.patient[rows]
    first = torch.ones_like(patient, dtype=torch.bool)
    first[1:] = patient[1:] != patient[:-1]
    return rows[first]


def noised_counts(counts: Iterable[int], event: PrivacyEvent) -> list[float]:
    """Counts with the event's noise in each."""
    if event.kind == "unnoised":
        return [float(count) for count in counts]
    draws = SecretDraws()
    return [float(count + discrete_laplace(event.noise_multiplier, draws)) for count in counts]


def shares(counts: np.ndarray[tuple[int, ...], np.dtype[np.float64]], kind: str) -> list[float]:
    """Share of each class or label, from noised counts; equal shares where nothing is left of them."""
    kept = np.maximum(counts, 0.0)
    total = kept.sum(axis=1, keepdims=True)
    share = np.where(total > 0, kept / np.maximum(total, 1.0), 1 / counts.shape[1])
    return list(share[0] if kind == "multiclass" else share[:, 1])


def log_odds(share: Sequence[float], kind: str) -> tuple[float, ...]:
    """Logits that predict these shares: log-odds, for multiclass logarithms."""
    kept = [min(max(float(value), SMALLEST_SHARE), 1 - SMALLEST_SHARE) for value in share]
    return tuple(math.log(value) if kind == "multiclass" else math.log(value / (1 - value)) for value in kept)


# Means and spreads.


def column_sums(columns: Sequence[NumericColumn], data: Batch) -> Tensor:
    """[3, V] float64: over patients, the number observed, the sum of u, and of u^2 less half the number.

    u is a value over its column's bound, so within [-1, 1]; a record's u is the mean over its observed hours, and a
    patient's the mean over the records. `statistics_sensitivity` is the bound of what one patient adds.
    """
    parts = [_record_parts(column, data.inputs[column.modality].double()) for column in columns]
    weight = data.weight.double().nan_to_num(0.0).clamp(0, 1)
    return torch.stack([(part * weight).sum(-1) for part in parts], dim=1)


def _record_parts(column: NumericColumn, inputs: Tensor) -> Tensor:
    """[3, R]: one column's part of each record; zeros where it was not observed."""
    value, flag = inputs[..., column.value], inputs[..., column.flag] > 0
    seen = (flag & value.isfinite()).double().reshape(len(inputs), -1)
    scaled = torch.where(value.isfinite(), value / column.bound, 0.0).clamp(-1, 1).reshape(seen.shape)
    count = seen.sum(1).clamp(min=1)
    some = (seen.sum(1) > 0).double()
    mean, square = (scaled * seen).sum(1) / count, (scaled.square() * seen).sum(1) / count
    return torch.stack([some, mean, square - some / 2])


def noised_sums(sums: Tensor, noise: float) -> list[float]:
    """Flat list of the sums with Gaussian noise of this standard deviation, on a grid; 0 for none."""
    flat = sums.flatten().cpu()
    if noise > 0:
        flat = on_grid(flat, torch.from_numpy(secret_normals(len(flat))), noise)
    return [float(value) for value in flat]


def rescaling(columns: Sequence[NumericColumn], sums: Tensor, noise: float) -> dict[str, Rescaling]:
    """Centers and scales from noised sums; the study's own for columns whose mean would mostly be noise.

    Args:
        columns: V of them.
        sums: [3, V] as `column_sums`, with noise.
        noise: standard deviation of the noise.
    """
    bound = torch.tensor([column.bound for column in columns], dtype=torch.float64)
    count, first, second = sums
    number = count.clamp(min=1.0)
    mean = (first / number).clamp(-1, 1)
    variance = ((second + count / 2) / number - mean.square()).clamp(min=0.0)
    sure = (count >= 1) & (noise * bound / number <= SURE)
    centers = torch.where(sure, mean * bound, 0.0).tolist()
    # Twice the noise of the variance is what a spread could be by chance.
    least = (2 * noise / number).sqrt().mul(bound).clamp(FINEST, SPREADS[0])
    spread = torch.minimum(torch.maximum(variance.sqrt() * bound, least), variance.new_tensor(SPREADS[1]))
    scales = torch.where(sure, spread, 1.0).tolist()
    result = {}
    for modality in dict.fromkeys(column.modality for column in columns):
        at = [place for place, column in enumerate(columns) if column.modality == modality]
        result[modality] = Rescaling.of(
            [columns[place] for place in at], [centers[place] for place in at], [scales[place] for place in at]
        )
    return result
