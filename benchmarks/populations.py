"""Cohorts of the benchmark `results.py` that are not among the example studies: each is written from scratch.

The diabetes data are those of Efron, Hastie, Johnstone and Tibshirani (2004, "Least angle regression", Annals of
Statistics 32, 407-499), as scikit-learn ships them: 442 patients, ten baseline variables, and the progression of the
disease one year later. They were seen once when the rule of shrinkage was changed
(docs/decisions/0022); nothing else was chosen on them.

The infarction data are 500 patients of the Worcester Heart Attack Study (Hosmer, Lemeshow and May, 2008, "Applied
Survival Analysis", 2nd edition, section 1.3), as scikit-survival ships them: what was known on the day of admission,
and whether the patient died within a year. What is here was written before any model had seen them; they were run
once, and nothing was changed after.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HONEST, USELESS, TINY = 6, "useless", "tiny"
"""Hospitals of the planted cohort beside the two planted ones; those have names of hospitals too, renamed here."""
TINY_PATIENTS = 20


def demo(seed: int) -> Callable[[Path], Path]:
    """The demo's six hospitals, of a generator seed that nothing was developed on."""

    def write(folder: Path) -> Path:
        from gapweave.sites.demo import write_demo

        return write_demo(folder, seed=seed)

    return write


def planted(world: int) -> Callable[[Path], Path]:
    """Six hospitals of the demo, one whose labels say nothing, and one with 20 patients, which allows so few.

    The folder `honest` beside `sites` has the site files of the six alone.
    """
    return lambda folder: _planted(folder, world)


def _planted(folder: Path, world: int) -> Path:
    from gapweave.sites.demo import hospital_names, write_demo

    names = hospital_names(HONEST + 2)
    patients = [250, 400, 350, 800, 300, 450, 400, TINY_PATIENTS]
    study = write_demo(folder, seed=world, hospitals=HONEST + 2, patients=patients)
    for name, planted_name in zip(names[HONEST:], (USELESS, TINY), strict=True):
        file = folder / "sites" / f"{name}.yaml"
        site = yaml.safe_load(file.read_text(encoding="utf-8"))
        site |= {"name": planted_name, "policy": {**site.get("policy", {}), "min_patients": 1}}
        text = yaml.safe_dump(site, sort_keys=False)
        (folder / "sites" / f"{planted_name}.yaml").write_text(text, encoding="utf-8")
        file.unlink()
    shuffle_labels(folder / "data" / names[HONEST] / "records.csv")
    (folder / "honest").mkdir()
    for name in names[:HONEST]:
        text = (folder / "sites" / f"{name}.yaml").read_text(encoding="utf-8")
        (folder / "honest" / f"{name}.yaml").write_text(text, encoding="utf-8")
    return study


def shuffle_labels(file: Path) -> None:
    """Give every record the label of another one."""
    from gapweave.sites.demo.world import LABEL

    with file.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    labels = [row[LABEL] for row in rows]
    random.Random(0).shuffle(labels)
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, LABEL: label} for row, label in zip(rows, labels, strict=True))


def _diabetes() -> Iterator[dict[str, float]]:
    from sklearn.datasets import load_diabetes

    progressed = 140  # of a unit of its own, 25 to 346: about half of the patients are above
    found = load_diabetes(scaled=False)
    for values, target in zip(found.data, found.target, strict=True):
        named = dict(zip(found.feature_names, map(float, values), strict=True))
        yield {"progressed": int(target > progressed), **named}


def _infarction() -> Iterator[dict[str, float]]:
    from sksurv.datasets import load_whas500

    patients, outcomes = load_whas500()
    for (_, values), (died, days) in zip(patients.iterrows(), outcomes, strict=True):
        yield {"died": int(died and days <= 365), **{name: float(value) for name, value in values.items()}}


@dataclass(frozen=True, kw_only=True)
class Tables:
    """Patients of one table, dealt at random to sites of which one lacks a modality.

    Attributes:
        name: of the study.
        label: column of the outcome.
        share: publicly known share of patients who have it.
        patients: a row each.
        variables: of each modality, what is publicly known of each column.
        sites: share of the patients of each.
        lacking: site, and the modality that it has not.
    """

    name: str
    label: str
    share: float
    patients: Callable[[], Iterator[dict[str, float]]]
    variables: dict[str, dict[str, dict[str, Any]]]
    sites: dict[str, float]
    lacking: tuple[str, str]

    def write(self, folder: Path) -> Path:
        """A study file, and of each site a table and a site file."""
        rows = list(self.patients())
        order = list(range(len(rows)))
        random.Random(0).shuffle(order)
        (folder / "sites").mkdir(parents=True)
        start = 0.0
        for site, share in self.sites.items():
            mine = order[round(start * len(order)) : round((start + share) * len(order))]
            start += share
            with (folder / f"{site}.csv").open("w", encoding="utf-8", newline="") as stream:
                writer = csv.DictWriter(stream, ["patient", *rows[0]])
                writer.writeheader()
                writer.writerows({"patient": f"p{at:03}", **rows[at]} for at in mine)
            text = yaml.safe_dump(self._site(site), sort_keys=False)
            (folder / "sites" / f"{site}.yaml").write_text(text, encoding="utf-8")
        (folder / "study.yaml").write_text(yaml.safe_dump(self._study(), sort_keys=False), encoding="utf-8")
        return folder / "study.yaml"

    def _site(self, site: str) -> dict[str, Any]:
        table = {"file": f"../{site}.csv", "id": "patient"}
        held = {
            modality: {**table, "columns": {column: column for column in columns}}
            for modality, columns in self.variables.items()
            if (site, modality) != self.lacking
        }
        return {
            "version": 1,
            "name": site,
            "data": {"records": {**table, "patient": "patient", "label": {self.label: self.label}}, **held},
            "cohort": f"{self.name}-{site}",
            "state": f"../state/{site}",
        }

    def _study(self) -> dict[str, Any]:
        return {
            "version": 1,
            "name": self.name,
            "task": {"kind": "binary", "label": self.label},
            "modalities": {
                modality: {"kind": "table", "columns": columns} for modality, columns in self.variables.items()
            },
            "model": {"embedding": 16, "fusion": "late", "imputer": "none"},
            "sharing": {"policy": "all"},
            "training": {"rounds": 20, "lr": 1.0},
            "privacy": {"enabled": True, "epsilon": 8, "delta": 1e-5},
            "preparation": {"class_balance": [self.share]},
            "evaluation": {"test_fraction": 0.2, "split_seed": 0},
        }


SITES = {"east": 0.4, "west": 0.35, "north": 0.25}
FLAG = {"categories": [0, 1]}

DIABETES = Tables(
    name="diabetes",
    label="progressed",
    share=0.5,
    patients=_diabetes,
    # Ranges: what is usual in adults, not what these patients have.
    variables={
        "basics": {
            "age": {"card": "age"},
            "sex": {"categories": [1, 2]},
            "bmi": {"low": 12, "high": 60, "center": 26, "scale": 5, "unit": "kg/m2"},
            "bp": {"card": "bp_mean"},
        },
        # Logarithm of the triglycerides, and glucose.
        "blood": {
            "s5": {"low": 2.5, "high": 7, "center": 4.7, "scale": 0.5},
            "s6": {"low": 30, "high": 300, "center": 95, "scale": 15},
        },
        # Total, LDL and HDL cholesterol in mg/dL, and their ratio.
        "lipids": {
            "s1": {"low": 70, "high": 400, "center": 190, "scale": 38},
            "s2": {"low": 20, "high": 300, "center": 115, "scale": 33},
            "s3": {"low": 10, "high": 130, "center": 50, "scale": 14},
            "s4": {"low": 1, "high": 12, "center": 4, "scale": 1.3},
        },
    },
    sites=SITES,
    lacking=("north", "lipids"),
)
INFARCTION = Tables(
    name="infarction",
    label="died",
    # Of those who came to a hospital with an infarction around the year 2000, about a quarter died within a year.
    share=0.25,
    patients=_infarction,
    variables={
        # History: cardiovascular disease, an infarction before this one.
        "person": {"age": {"card": "age"}, "gender": FLAG, "bmi": {"card": "bmi"}, "cvd": FLAG, "miord": FLAG},
        # Cardiogenic shock, congestive heart failure.
        "circulation": {
            "hr": {"card": "heart_rate"},
            "sysbp": {"card": "bp_sys"},
            "diasbp": {"card": "bp_dia"},
            "sho": FLAG,
            "chf": FLAG,
        },
        # Atrial fibrillation, complete heart block, Q waves.
        "ecg": {"afb": FLAG, "av3": FLAG, "mitype": FLAG},
    },
    sites=SITES,
    lacking=("north", "ecg"),
)
