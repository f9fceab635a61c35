"""`gapweave site check`: all that can be said of a site's data before a run, past the first problem."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import polars as pl
from numpy.typing import NDArray

from gapweave.client.data import label_where, no_modality, read_modality, read_subgroups, split_patients
from gapweave.client.sources import score
from gapweave.client.sources.files import Files
from gapweave.client.sources.findings import Finding, Status
from gapweave.client.sources.labels import Targets, check_classes, class_counts, read_targets
from gapweave.client.sources.oddities import (
    beyond_upper,
    declared,
    label_as_input,
    label_as_text,
    one_valued,
    read_twice,
    unused,
    without_label,
    without_modality,
)
from gapweave.client.sources.place import read_source
from gapweave.client.sources.records import Reading, Records, read_records, refuse_repeats
from gapweave.shared.config.site import Site
from gapweave.shared.config.sources import ClinicalSource, ColumnsSource, ImageSource, MeasurementSource, Source
from gapweave.shared.config.study import Study
from gapweave.shared.errors import DataError, GapweaveError, RefusedError, Unreachable, UsageError

__all__ = ["Finding", "as_json", "check_site"]

Result = TypeVar("Result")


def check_site(study: Study | None, site: Site, site_file: Path, data_dir: Path | None = None) -> list[Finding]:
    """Run every check on a site's data.

    Args:
        study: None: only whether files and columns are there and readable.
        site: the site file.
        site_file: its path; relative paths in it are relative to its folder.
        data_dir: folder of data sets, searched first.

    Returns:
        One finding a line, in the order of the checks; a problem does not stop the ones that can go on.
    """
    check = _Check(site, Files(site_file=site_file, data_dir=data_dir, database=site.data.database))
    findings, state = check.run(study), site_file.parent / site.state
    from gapweave.client import doctor

    findings += [doctor.check_device(site, site_file), *doctor.check_policy(site, site_file, state)]
    if site.server is None:
        said = "no hub is named, as in a simulation: disk, memory, budget and approval are not looked at"
        return [*findings, Finding(id="server", status="ok", where=f"{site_file}:server", message=said)]
    from gapweave.client.service import Deployment

    findings += doctor.check_machine(state)
    if study is not None:
        findings += doctor.check_budget(study, site, state, check.training)
        findings.append(doctor.check_approval(study, site, site_file))
    return [*findings, *doctor.check_hub(Deployment(site_file.resolve(), site))]


RAREST = 8
"""So many variables of a modality are listed with the share of records that have them."""

OUT_OF_REACH = frozenset({"reach", "connection", "name", "server", "tls", "clock", "version", "authentication"})
OF_THE_SITE = frozenset({"key", "state", "device", "disk", "memory"})
OF_THE_BUDGET = frozenset({"ledger", "budget", "plan", "policy"})


def exit_code(findings: Iterable[Finding]) -> int:
    """That of the first kind which has a problem: data, database or hub, the site's own machine, budget."""
    found = {finding.id for finding in findings if finding.status == "problem"}
    if not found:
        return 0
    if found - OUT_OF_REACH - OF_THE_SITE - OF_THE_BUDGET:
        return DataError.exit_code
    if found & OUT_OF_REACH:
        return Unreachable.exit_code
    return UsageError.exit_code if found & OF_THE_SITE else RefusedError.exit_code


def as_json(findings: Iterable[Finding]) -> dict[str, Any]:
    """The findings as `--json` prints them."""
    checks = [asdict(finding) for finding in findings]
    return {"ok": all(check["status"] != "problem" for check in checks), "checks": checks}


class _Check:
    """One run of the checks; collects what they find."""

    def __init__(self, site: Site, files: Files) -> None:
        self.site = site
        self.files = files
        self.findings: list[Finding] = []
        self.training: int | None = None

    def run(self, study: Study | None) -> list[Finding]:
        self._database()
        records = self._attempt("records", lambda: read_records(self.site, self.files, self.findings))
        if records is not None:
            self._records(records)
        if study is None or records is None:
            self._columns(records)
        else:
            self._against(study, records)
        return self.findings

    def _add(self, check: str, status: Status, where: str, message: str, remedy: str = "") -> None:
        self.findings.append(Finding(id=check, status=status, where=where, message=message, remedy=remedy))

    def _attempt(self, check: str, action: Callable[[], Result]) -> Result | None:
        """The action's result; None, and a problem that is told once, when it fails."""
        try:
            return action()
        except GapweaveError as error:
            if (error.where, error.what) not in {(finding.where, finding.message) for finding in self.findings}:
                kind = "reach" if isinstance(error, Unreachable) else check
                self._add(kind, "problem", error.where, error.what, error.remedy)
            return None

    def _database(self) -> None:
        """Whether the database can be read, and its user may do no more than that."""
        if self.files.database is None:
            return
        from gapweave.client.sources.sql import may_write

        where = self.files.key("data.database")
        may = self._attempt("database", lambda: may_write(self.files))
        if may:
            self._add("database", "warning", where, "its user may change tables", "Use one that may only read")
        elif may is False:
            self._add("database", "ok", where, "its user may only read")

    def _records(self, records: Records) -> None:
        where, patients = records.table.place, len(records.patient_ids)
        self._add("records", "ok", where, f"{len(records)} records of {patients} patients")
        self._attempt("duplicates", lambda: refuse_repeats(records))
        if not any(finding.id == "record_cap" for finding in self.findings):
            self._add("record_cap", "ok", where, f"no patient has over {self.site.patients.max_records} records")
        self._attempt("subgroups", lambda: read_subgroups(self.site, records))
        message = f"{patients} patients are within patients.upper={self.site.patients.upper}"
        within = Finding(id="upper", status="ok", where=self.files.key("patients.upper"), message=message)
        self.findings += beyond_upper(self.site, patients, self.files) or [within]

    def _columns(self, records: Records | None) -> None:
        """What can be checked without a study: that files and columns are there."""
        if records is not None:
            labels = self.site.data.records.label.values()
            named = [label.column for label in labels if label.column is not None and label.query is None]
            for column in [*named, *([self.site.split.column] if self.site.split.column else [])]:
                self._attempt("records", partial(records.table.column, column))
        for name, source in self.site.data.modalities.items():
            message = self._attempt("modality", partial(self._openable, name, source, records))
            if message is not None:
                self._add("modality", "ok", self.files.key(f"data.{name}"), message)

    def _openable(self, name: str, source: Source, records: Records | None) -> str:
        if isinstance(source, ImageSource):
            self.files.find_folder(source.folder, self.files.key(f"data.{name}"))
            if records is not None:
                records.table.column(source.column)
            return "the folder is there"
        if isinstance(source, MeasurementSource | ClinicalSource):
            from gapweave.client.sources.omop import count

            return f"{count(source, self.files, self.files.key(f'data.{name}'))} rows of these concepts"
        wanted = _columns_of(source, self.site.data.records.id)
        table = read_source(source, wanted, self.files, self.files.key(f"data.{name}"), keep=_none_of)
        for column in wanted:
            table.column(column)
        if records is not None and source.index is not None:
            records.table.column(source.index)
        return f"{table.rows} rows, all columns are there"

    def _against(self, study: Study, records: Records) -> None:
        targets = self._attempt("labels", lambda: read_targets(study.task, self.site, self.files, records))
        if targets is not None:
            self._labels(study, records, targets)
        held_out = self._attempt("split", lambda: split_patients(study, self.site, records))
        if held_out is not None:
            message = f"{int(held_out.sum())} of {len(held_out)} patients are held out"
            self._add("split", "ok", self.files.key("split"), message)
        present = self._modalities(study, records)
        self.findings += unused(study, self.site, self.files)
        self.findings += read_twice(self.site, self.files) + label_as_input(study, self.site, self.files)
        self.findings += label_as_text(study, self.site, self.files)
        if targets is not None and present is not None:
            self.findings += without_modality(targets, present, label_where(study, self.site, records))
        if targets is not None and held_out is not None and present is not None:
            usable = np.logical_and(targets.known.any(axis=1), present.any(axis=1))
            training = usable & ~held_out[records.patient]
            self._cohort(study, records, targets, training)

    def _labels(self, study: Study, records: Records, targets: Targets) -> None:
        where, known = label_where(study, self.site, records), targets.known.any(axis=1)
        self._add(
            "labels", "ok", where, f"{int(known.sum())} records have a label: {class_counts(study.task, targets)}"
        )
        self.findings += without_label(targets, where)
        self.findings += one_valued(study.task, targets, where)

    def _modalities(self, study: Study, records: Records) -> NDArray[np.bool_] | None:
        """Which record has which modality, [R, M]; None when one could not be read."""
        present = np.zeros((len(records), len(study.order)), np.bool_)
        complete = True
        held = self.site.held(study)
        for name in sorted(held, key=study.scores.__contains__):
            reading = Reading(modality=name, files=self.files, records=records, findings=self.findings)
            if name in study.scores:
                result = self._attempt("modality", partial(score.read, study, self.site, reading, present))
            else:
                result = self._attempt("modality", partial(read_modality, study, self.site, reading))
            complete &= result is not None
            if result is not None:
                present[:, study.order.index(name)] = result[1]
                self._share(reading, result[1])
        lacking = [name for name in study.order if name not in held]
        if len(lacking) == len(study.order):
            error = no_modality(study, self.files)
            self._add("modality", "problem", error.where, error.what, error.remedy)
            return None
        if lacking:
            self._add("modality", "ok", self.files.key("data"), f"the site lacks {', '.join(lacking)}")
        return present if complete else None

    def _share(self, reading: Reading, present: NDArray[np.bool_]) -> None:
        count = int(present.sum())
        if count:
            message = f"{count} of {len(present)} records have it ({count / len(present):.0%})"
            rarest = sorted(reading.shares.items(), key=lambda one: one[1])[:RAREST]
            among = "; of those: " if len(rarest) == len(reading.shares) else "; rarest of those: "
            shown = among + ", ".join(f"{name} {share:.0%}" for name, share in rarest) if rarest else ""
            self._add("modality", "ok", reading.key(), message + shown)

    def _cohort(self, study: Study, records: Records, targets: Targets, training: NDArray[np.bool_]) -> None:
        where = label_where(study, self.site, records)
        self._attempt("classes", lambda: check_classes(study.task, targets, training, where))
        patients, least = len(np.unique(records.patient[training])), self.site.policy.min_patients
        self.training = patients
        key = self.files.key("policy.min_patients")
        if patients < least:
            message = f"{patients} training patients are fewer than policy.min_patients={least}"
            self._add("cohort", "problem", key, message, "Lower the limit only if the hospital agrees")
        else:
            self._add("cohort", "ok", key, f"{patients} training patients")
        self.findings += declared(self.site, patients, self.files)


def _none_of(part: pl.DataFrame) -> pl.DataFrame:
    return part.clear()


def _columns_of(source: Any, record_id: str) -> list[str]:
    """Every column of its file that a source names."""
    columns = [source.id or record_id, *([source.time] if source.time else [])]
    if not isinstance(source, ColumnsSource):
        return [*columns, *source.columns]
    if source.item is not None and source.value is not None:
        return [*columns, source.item, source.value]
    return [*columns, *(column.column for column in source.columns.values())]
