"""The types that carry patients' data: one batch of records, grouped by patient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gapweave.shared.config.modalities import ImageModality, ModalitySpec, PublicScore, SeriesModality, TableModality
from gapweave.shared.config.study import Study
from gapweave.shared.features import series as series_features
from gapweave.shared.features import table as table_features


@dataclass(frozen=True, kw_only=True)
class Modality:
    """One kind of data: its name, what the study says of it, and the shape of one record's input."""

    name: str
    spec: ModalitySpec
    shape: tuple[int, ...]


def modalities(study: Study) -> tuple[Modality, ...]:
    """The study's modalities in canonical order."""
    return tuple(
        Modality(name=name, spec=study.modalities[name], shape=input_shape(study.modalities[name]))
        for name in study.order
    )


def input_shape(spec: ModalitySpec) -> tuple[int, ...]:
    """Shape of one record's input: [F] table, [2] score, [T, 2V] series, [C, H, W] image, [width] text."""
    if isinstance(spec, TableModality | PublicScore):
        return (table_features.width(spec.columns),)
    if isinstance(spec, SeriesModality):
        return (spec.hours, series_features.channels(spec.columns))
    if isinstance(spec, ImageModality):
        return (spec.channels, spec.size, spec.size)
    return (spec.width,)


class Features(dict[str, Tensor]):
    """Inputs by modality of which all that training does not change is done: see `MultimodalModel.features`."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Records of some patients. All of a patient's records are together; nothing else couples patients.

    Attributes:
        inputs: by modality that the site holds, [R, ...]; a row whose modality is absent is never read. As `Features`
            where the model has taken them before.
        present: [R, M] bool, in the study's canonical order; False throughout for modalities not held.
        target: [R, K] float: 0/1 a binary or multilabel output, one-hot for multiclass.
        label_mask: [R, K] bool: which targets are known.
        patient: [R] int64: position of the record's patient among the batch's patients.
        weight: [R] float: 1 over the patient's number of usable records; 0 for a record without label or modality.
        patients: number of patients P; some may own no usable record.
    """

    inputs: Mapping[str, Tensor]
    present: Tensor
    target: Tensor
    label_mask: Tensor
    patient: Tensor
    weight: Tensor
    patients: int

    def __len__(self) -> int:
        return len(self.patient)

    def each_input(self, change: Callable[[Tensor], Tensor]) -> Mapping[str, Tensor]:
        """The inputs, each changed; `Features` stay what they are."""
        changed = {name: change(tensor) for name, tensor in self.inputs.items()}
        return Features(changed) if isinstance(self.inputs, Features) else changed

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return replace(
            self,
            inputs=self.each_input(lambda tensor: tensor.to(device)),
            present=self.present.to(device),
            target=self.target.to(device),
            label_mask=self.label_mask.to(device),
            patient=self.patient.to(device),
            weight=self.weight.to(device),
        )

    def of_patients(self, chosen: Tensor) -> Batch:
        """The records of the chosen patients.

        Args:
            chosen: [P'] int64, positions of patients, ascending; duplicates are not allowed.

        Returns:
            A batch with P' patients, renumbered in the order given.
        """
        position = torch.full((self.patients,), -1, dtype=torch.int64, device=self.patient.device)
        position[chosen] = torch.arange(len(chosen), device=self.patient.device)
        rows = (position[self.patient] >= 0).nonzero()[:, 0]
        return replace(self.rows(rows), patient=position[self.patient[rows]], patients=len(chosen))

    def prevalence(self) -> list[float]:
        """[K] share of positives among records with a known target, each patient counted once; NaN where none is."""
        weight = self.weight.unsqueeze(1) * self.label_mask
        share: list[float] = ((self.target * weight).sum(0) / weight.sum(0)).tolist()
        return share

    def rows(self, rows: Tensor) -> Batch:
        """The given records, patients numbered as before."""
        return replace(
            self,
            inputs=self.each_input(lambda tensor: tensor.index_select(0, rows)),
            present=self.present.index_select(0, rows),
            target=self.target.index_select(0, rows),
            label_mask=self.label_mask.index_select(0, rows),
            patient=self.patient.index_select(0, rows),
            weight=self.weight.index_select(0, rows),
        )


def complete(study: Study, batch: Batch) -> Batch:
    """The batch with zeros, which nothing reads, for modalities that its site does not hold."""
    inputs = {
        modality.name: batch.inputs.get(modality.name, torch.zeros(len(batch), *modality.shape))
        for modality in modalities(study)
    }
    return replace(batch, inputs=inputs)
