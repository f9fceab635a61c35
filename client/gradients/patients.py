"""Which records belong to which patient, and what each patient's gradient is multiplied with."""

from __future__ import annotations

import torch
from torch import Tensor


class Patients:
    """Which of the batch's records belong to which patient.

    Args:
        patient: [R] position of each record's patient.
        patients: P.

    Attributes:
        count: P.
        most: records that a patient has at most.
        simple: whether record i is patient i, so that nothing needs sorting.
    """

    def __init__(self, patient: Tensor, patients: int) -> None:
        self.count, self._patient, self.records = patients, patient, len(patient)
        self.simple = self.records == patients and bool((patient[1:] > patient[:-1]).all())
        self.most = 1
        if self.simple:
            return
        counts = torch.bincount(patient, minlength=patients)
        order = torch.argsort(patient, stable=True)
        start = torch.cumsum(counts, 0) - counts
        within = torch.arange(self.records, device=patient.device) - start[patient[order]]
        self.most = int(counts.max())
        self._slots = torch.full((patients, self.most), self.records, dtype=torch.int64, device=patient.device)
        self._slots[patient[order], within] = order
        self._several = (counts > 1).nonzero()[:, 0]

    def sequence(self, values: Tensor) -> Tensor:
        """[R, S, F] to [P, K S, F]: a patient's records one after the other, zeros where there are fewer than K."""
        if self.simple:
            return values
        padded = torch.cat([values, torch.zeros_like(values[:1])])
        return padded[self._slots].flatten(1, 2)

    def total(self, values: Tensor) -> Tensor:
        """[R, ...] to [P, ...]: the sum over a patient's records."""
        if self.simple:
            return values
        result = torch.zeros(self.count, *values.shape[1:], dtype=values.dtype, device=values.device)
        return result.index_add_(0, self._patient, values)

    def of_records(self, values: Tensor) -> Tensor:
        """[P] to [R]: each record has its patient's value."""
        return values if self.simple else values[self._patient]

    def crossed(self, pairs: Tensor) -> Tensor:
        """[Q, K, K] of the patients with several records to [P]: the sum over pairs of different records."""
        real = self._slots[self._several] < self.records
        different = real.unsqueeze(1) & real.unsqueeze(2)
        different.diagonal(dim1=1, dim2=2).fill_(False)
        result = torch.zeros(self.count, dtype=pairs.dtype, device=pairs.device)
        result[self._several] = torch.where(different, pairs, 0.0).sum((1, 2))
        return result

    def several(self) -> Tensor:
        """[Q, K] positions of the records of patients with more than one; their first fills up the row."""
        slots = self._slots[self._several]
        return torch.where(slots < self.records, slots, slots[:, :1])


class Factors:
    """What each patient's gradient is multiplied with; a patient who is not kept contributes exactly zero.

    Args:
        factor: [P], 0 for patients not kept, in the type of the gradients.
        keep: [P] bool, or None for all.
        patients: of the batch.

    Attributes:
        patients: [P], the factors.
        records: [R], of each record's patient.
    """

    def __init__(self, factor: Tensor, keep: Tensor | None, patients: Patients) -> None:
        self.patients, self._keep = factor, keep
        self.records = patients.of_records(factor)
        self._keep_records = None if keep is None else patients.of_records(keep)

    def kept(self, values: Tensor) -> Tensor:
        """[P, ...] with zeros for patients not kept: chosen, as zero times NaN is NaN."""
        return _chosen(values, self._keep)

    def kept_records(self, values: Tensor) -> Tensor:
        """[R, ...] with zeros for their records."""
        return _chosen(values, self._keep_records)


def _chosen(values: Tensor, keep: Tensor | None) -> Tensor:
    return values if keep is None else torch.where(keep.view(-1, *[1] * (values.ndim - 1)), values, 0.0)
