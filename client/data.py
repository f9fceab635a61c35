"""A site's cohort: its files as one batch of records grouped by patient, and who of them is held out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gapweave.client.sources import images, score, series, table, text
from gapweave.client.sources.cells import code_text, missing
from gapweave.client.sources.files import Files
from gapweave.client.sources.findings import Finding, refuse_problems
from gapweave.client.sources.labels import Targets, check_classes, read_targets, unlabelled
from gapweave.client.sources.oddities import (
    beyond_upper,
    declared,
    label_as_input,
    label_as_text,
    narrow,
    one_valued,
    read_twice,
    unused,
    without_label,
    without_modality,
)
from gapweave.client.sources.records import Reading, Records, read_records, refuse_repeats
from gapweave.client.sources.split import test_patients
from gapweave.shared.config.modalities import ImageModality, SeriesModality, TableModality, TextModality
from gapweave.shared.config.simulation import Simulation
from gapweave.shared.config.site import Site
from gapweave.shared.config.sources import ClinicalSource, ColumnsSource, ImageSource, MeasurementSource, TextSource
from gapweave.shared.config.study import Study
from gapweave.shared.errors import DataError, UsageError
from gapweave.shared.schema import Batch

MOST_HIDDEN = 0.95
"""Cap of the rate at which a modality is hidden, when it depends on the label."""


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """All records of a site that a study can use.

    Attributes:
        site: the site's name.
        batch: every record, grouped by patient.
        record_ids: [R].
        patient_ids: [P].
        test: [P] bool, who is held out.
        subgroups: by subgroup, the code of each record [R]; None where unknown.
    """

    site: str
    batch: Batch
    record_ids: tuple[str, ...]
    patient_ids: tuple[str, ...]
    test: Tensor
    subgroups: Mapping[str, tuple[str | None, ...]]

    def training(self) -> Batch:
        """Patients who are not held out and have a usable record, renumbered."""
        chosen = self._usable() & ~self.test
        return self.batch if chosen.all() else self.batch.of_patients(chosen.nonzero()[:, 0])

    def training_ids(self) -> list[str]:
        """Ids of the patients of `training`, in their order."""
        return [self.patient_ids[at] for at in (self._usable() & ~self.test).nonzero()[:, 0].tolist()]

    def testing(self) -> Batch:
        """Patients who are held out and have a usable record, renumbered."""
        return self.batch.of_patients((self._usable() & self.test).nonzero()[:, 0])

    def testing_subgroups(self) -> dict[str, tuple[str | None, ...]]:
        """Subgroups of the records of `testing`, in their order."""
        rows = (self._usable() & self.test)[self.batch.patient].nonzero()[:, 0].tolist()
        return {name: tuple(codes[row] for row in rows) for name, codes in self.subgroups.items()}

    def digest(self) -> str:
        """SHA-256 over all that a study reads of the site, and who is held out."""
        batch, digest = self.batch, hashlib.sha256()
        for tensor in (*batch.inputs.values(), batch.present, batch.target, batch.label_mask, batch.weight, self.test):
            digest.update(np.ascontiguousarray(tensor.numpy()).data)
        digest.update(json.dumps([self.record_ids, self.patient_ids, batch.patient.tolist()]).encode())
        return digest.hexdigest()

    def _usable(self) -> Tensor:
        usable = torch.zeros(self.batch.patients, dtype=torch.bool)
        usable[self.batch.patient[self.batch.weight > 0]] = True
        return usable


Inputs = dict[str, NDArray[np.float32]]


def load_cohort(
    study: Study,
    site: Site,
    *,
    site_file: Path,
    data_dir: Path | None = None,
    labels: bool = True,
    findings: list[Finding] | None = None,
) -> Cohort:
    """Read a site's files for a study.

    Args:
        study: what all sites agreed on.
        site: the site file.
        site_file: its path; relative paths in it are relative to its folder.
        data_dir: folder of data sets, searched first.
        labels: False for prediction: no label or split column is needed, every record counts, and nothing is
            hidden.
        findings: what `site check` says of the data is appended here (`findings.warnings_of`); its problems stop
            training, as it promises, and not prediction: a few new patients may look like one.

    Raises:
        DataError: for a problem in the site's data.
        UsageError: when site file and study do not fit together.
    """
    findings = [] if findings is None else findings
    before = len(findings)
    files = Files(site_file=site_file, data_dir=data_dir, database=site.data.database)
    records = read_records(site, files, findings, capped=labels)
    refuse_repeats(records)
    targets = read_targets(study.task, site, files, records) if labels else unlabelled(study.task, len(records))
    held_out = split_patients(study, site, records, labels=labels)
    inputs, present = _read_modalities(study, site, files, records, findings)
    findings += unused(study, site, files)
    if labels:
        findings += beyond_upper(site, len(records.patient_ids), files)
        findings += read_twice(site, files) + label_as_input(study, site, files) + label_as_text(study, site, files)
        findings += without_label(targets, label_where(study, site, records))
        findings += without_modality(targets, present, label_where(study, site, records))
        findings += one_valued(study.task, targets, label_where(study, site, records))
        present = hide(present, study, site.name, records, targets)
    for name in [name for name in site.held(study) if name in study.scores]:
        reading = Reading(modality=name, files=files, records=records, findings=findings)
        inputs[name], present[:, study.order.index(name)] = score.read(study, site, reading, present)
    for name, rows in inputs.items():
        rows[~present[:, study.order.index(name)]] = 0
    usable = np.ones(len(records), np.bool_)
    if labels:
        refuse_problems(findings[before:])
        usable = np.logical_and(targets.known.any(axis=1), present.any(axis=1))
        training = usable & ~held_out[records.patient]
        check_classes(study.task, targets, training, label_where(study, site, records))
        findings += declared(site, len(np.unique(records.patient[training])), files)
    return Cohort(
        site=site.name,
        batch=_batch(records, inputs, present, targets, usable),
        record_ids=records.ids,
        patient_ids=records.patient_ids,
        test=torch.from_numpy(held_out),
        subgroups=read_subgroups(site, records, required=labels),
    )


def label_where(study: Study, site: Site, records: Records) -> str:
    """The label columns, for messages."""
    columns = [site.data.records.label[name].column or name for name in study.task.labels]
    return records.table.where(",".join(columns))


def split_patients(study: Study, site: Site, records: Records, *, labels: bool = True) -> NDArray[np.bool_]:
    """Who is held out, [P]; new patients (``labels`` False) need no split column.

    Raises:
        DataError: for a split column that is missing or unclear, or that puts a patient on both sides.
    """
    if not labels and site.split.column is not None:
        return np.zeros(len(records.patient_ids), np.bool_)
    return test_patients(study.evaluation, site, records)


def read_subgroups(site: Site, records: Records, *, required: bool = True) -> dict[str, tuple[str | None, ...]]:
    """Codes of each record's subgroups, None where unknown.

    Raises:
        DataError: for a column that is missing, unless it is not ``required``.
    """
    result: dict[str, tuple[str | None, ...]] = {}
    for name, column in site.subgroups.items():
        if not required and column not in records.table.names:
            result[name] = (None,) * len(records)
            continue
        codes = code_text(records.table.column(column))
        result[name] = tuple(codes.set(missing(codes), None).to_list())
    return result


def _read_modalities(
    study: Study, site: Site, files: Files, records: Records, findings: list[Finding]
) -> tuple[Inputs, NDArray[np.bool_]]:
    inputs: Inputs = {}
    present = np.zeros((len(records), len(study.order)), np.bool_)
    for at, name in enumerate(study.order):
        if name in site.data.modalities and name not in study.scores:
            reading = Reading(modality=name, files=files, records=records, findings=findings)
            inputs[name], present[:, at] = read_modality(study, site, reading)
    if not inputs:
        raise no_modality(study, files)
    return inputs, present


def no_modality(study: Study, files: Files) -> DataError:
    """The error of a site that has nothing for the study."""
    measured = [name for name in study.order if name not in study.scores]
    return DataError(
        "the site has none of the study's modalities",
        where=files.key("data"),
        remedy=f"Add one of {', '.join(measured)}, or leave the site out of this study",
    )


def read_modality(study: Study, site: Site, reading: Reading) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Read one modality that site and study have; what is odd in it is noted in ``reading``.

    Returns:
        inputs [R, ...]; present [R].

    Raises:
        UsageError: when the site's entry does not fit the study's modality.
        DataError: for a problem in its files.
    """
    inputs, present = _reader(study, site, reading)(reading)
    if not present.any():
        reading.warn(
            "modality",
            reading.key(),
            f"none of the site's {len(present)} records has {reading.modality!r}, which the site file declares",
            "Compare ids, times and columns with the file, or remove the modality",
        )
    narrow(study, reading, inputs)
    return inputs, present


def _reader(
    study: Study, site: Site, reading: Reading
) -> Callable[[Reading], tuple[NDArray[np.float32], NDArray[np.bool_]]]:
    spec, source = study.modalities[reading.modality], site.data.modalities[reading.modality]
    if isinstance(spec, TableModality) and isinstance(source, ColumnsSource | MeasurementSource):
        return partial(table.read, spec, source)
    if isinstance(spec, SeriesModality) and isinstance(source, ColumnsSource | MeasurementSource):
        return partial(series.read, spec, source)
    if isinstance(spec, TextModality) and isinstance(source, TextSource | ClinicalSource):
        return partial(text.read, spec, source)
    if isinstance(spec, ImageModality) and isinstance(source, ImageSource):
        return partial(images.read, spec, source)
    form = {"text": "file and a list of columns", "image": "folder and column"}
    raise UsageError(
        f"the study's {reading.modality!r} is of the kind {spec.kind}, the site's entry is not",
        where=reading.key(),
        remedy=f"Give {form.get(spec.kind, 'file and a map from variable to column')}",
    )


def _batch(
    records: Records, inputs: Inputs, present: NDArray[np.bool_], targets: Targets, usable: NDArray[np.bool_]
) -> Batch:
    count = np.bincount(records.patient, weights=usable, minlength=len(records.patient_ids))
    weight = usable / np.maximum(count, 1)[records.patient]
    return Batch(
        inputs={name: torch.from_numpy(rows) for name, rows in inputs.items()},
        present=torch.from_numpy(present),
        target=torch.from_numpy(targets.value),
        label_mask=torch.from_numpy(targets.known),
        patient=torch.from_numpy(records.patient),
        weight=torch.from_numpy(weight.astype(np.float32)),
        patients=len(records.patient_ids),
    )


def hide(present: NDArray[np.bool_], study: Study, site: str, records: Records, targets: Targets) -> NDArray[np.bool_]:
    """Hide modalities as the study's simulation asks: a function of seed, site and record, and nothing else.

    A record keeps at least one of the modalities that it has.

    Args:
        present: [R, M].
        study: the study; without a missing rate nothing is hidden.
        site: the site's name.
        records: for their ids.
        targets: for mnar: of a record whose first target is 1 more is hidden.

    Returns:
        [R, M].
    """
    if study.simulation.missing_rate == 0:
        return present
    rate = _rates(study.simulation, targets)
    draw = np.array([[_uniform(study.seed, site, record, name) for name in study.order] for record in records.ids])
    hidden = present & (draw < rate[:, None])
    emptied = present.any(axis=1) & ~(present & ~hidden).any(axis=1)
    kept = np.where(present, draw, -1.0).argmax(axis=1)
    hidden[emptied, kept[emptied]] = False
    return present & ~hidden


def _rates(simulation: Simulation, targets: Targets) -> NDArray[np.float64]:
    rate = np.full(len(targets.value), simulation.missing_rate)
    if simulation.missing == "mnar":
        rate = np.minimum(rate * np.where(targets.value[:, 0] == 1, 1.5, 0.5), MOST_HIDDEN)
    return rate


def _uniform(*parts: object) -> float:
    """A number in [0, 1) from the hash of what names it."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56
