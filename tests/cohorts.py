"""Little cohorts on disk, for tests of what a site reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import torch

from gapweave.client.data import Cohort, load_cohort
from gapweave.client.sources.findings import Finding
from gapweave.shared.config.modalities import TableModality
from gapweave.shared.config.site import Site
from gapweave.shared.config.study import Study
from gapweave.shared.features.table import names

SODIUM = {"low": 100, "high": 180, "center": 140, "scale": 6, "unit": "mmol/L"}
GLUCOSE = {"low": 1, "high": 40, "log": True, "unit": "mmol/L", "molar_mass": 180.156}
TEMPERATURE = {"low": 25, "high": 44, "center": 37, "scale": 1, "unit": "degC"}
SEX = {"categories": [0, 1]}

LABS = {
    "kind": "table",
    "columns": {"sodium": SODIUM, "glucose": GLUCOSE, "temperature": TEMPERATURE, "sex": SEX},
}
VITALS = {
    "kind": "series",
    "hours": 24,
    "columns": {"bp": {"low": 30, "high": 280}, "pulse": {"low": 10, "high": 300}},
}
NOTE = {"kind": "text", "buckets": 32, "hours": 24}
CXR = {"kind": "image", "size": 8, "channels": 1}


def study(modalities: dict[str, Any], **keys: Any) -> Study:
    content = {
        "version": 1,
        "name": "little",
        "task": {"kind": "binary", "label": "y"},
        "modalities": modalities,
    }
    return Study.model_validate({**content, **keys})


class Hospital:
    """A folder with a site's files."""

    def __init__(self, folder: Path, name: str = "north") -> None:
        self.folder = folder
        self.site_file = folder / "site.yaml"
        self.content: dict[str, Any] = {
            "version": 1,
            "name": name,
            "data": {"records": {"file": "records.csv", "id": "id", "patient": "patient", "label": {"y": "y"}}},
        }

    def write(self, name: str, columns: dict[str, list[Any]]) -> Path:
        """Write a table; the extension says in which format."""
        path = self.folder / name
        frame = pl.DataFrame(columns, strict=False)
        if path.suffix == ".parquet":
            frame.write_parquet(path)
        else:
            frame.write_csv(path, separator="\t" if path.suffix == ".tsv" else ",")
        return path

    def records(self, count: int = 8, **columns: list[Any]) -> None:
        """One record a patient, alternating labels; further or other columns by name."""
        table: dict[str, list[Any]] = {
            "id": [f"r{row}" for row in range(count)],
            "patient": [f"p{row}" for row in range(count)],
            "y": [row % 2 for row in range(count)],
        }
        self.write("records.csv", {**table, **columns})

    def labs(self, count: int = 8, **columns: list[Any]) -> None:
        """A sodium for every record."""
        table: dict[str, list[Any]] = {
            "id": [f"r{row}" for row in range(count)],
            "na": [140.0 + row for row in range(count)],
        }
        self.write("labs.csv", {**table, **columns})
        self.add("labs", file="labs.csv", columns={"sodium": "na"})

    def add(self, modality: str, **source: Any) -> None:
        """Declare a modality in the site file."""
        self.content["data"][modality] = source

    def update(self, part: str, **keys: Any) -> None:
        """Change keys of data.records, split, patients, policy, ..."""
        holder = self.content["data"] if part == "records" else self.content
        holder[part] = {**holder.get(part, {}), **keys}

    @property
    def site(self) -> Site:
        return Site.model_validate(self.content)

    def load(self, of: Study, **options: Any) -> Cohort:
        return load_cohort(of, self.site, site_file=self.site_file, **options)

    def findings(self, of: Study) -> list[Finding]:
        found: list[Finding] = []
        self.load(of, findings=found)
        return found


def everything(cohort: Cohort) -> dict[str, torch.Tensor]:
    """All tensors of a cohort, by name."""
    batch = cohort.batch
    tensors = {f"input {name}": rows for name, rows in batch.inputs.items()}
    for name in ("present", "target", "label_mask", "patient", "weight"):
        tensors[name] = getattr(batch, name)
    return {**tensors, "test": cohort.test}


def assert_same(one: Cohort, other: Cohort, tolerance: float = 0.0) -> None:
    """Every tensor and id is the same."""
    left, right = everything(one), everything(other)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], rtol=0, atol=tolerance, msg=name)
    assert (one.record_ids, one.patient_ids) == (other.record_ids, other.patient_ids)


def value_of(cohort: Cohort, variable: str) -> torch.Tensor:
    """Scaled values [R] of a variable of `LABS`."""
    columns = TableModality.model_validate(LABS).columns
    return cohort.batch.inputs["labs"][:, names(columns).index(variable)]


def sodium_of(cohort: Cohort) -> torch.Tensor:
    """Sodium [R] in mmol/L."""
    return value_of(cohort, "sodium") * 6 + 140
