"""Cohorts of the benchmark `results.py` that are not among the example studies: each is written from scratch.

The diabetes data are those of Efron, Hastie, Johnstone and Tibshirani (2004, "Least angle regression", Annals of
Statistics 32, 407-499), as scikit-learn ships them: 442 patients, ten baseline variables, and the progression of the
disease one year later. They were seen once when the rule of shrinkage was changed
(docs/decisions/0022); nothing else was chosen on them.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Callable
from pathlib import Path

import yaml

HONEST, USELESS, TINY = 6, "useless", "tiny"
"""Hospitals of the planted cohort beside the two planted ones; those have names of hospitals too, renamed here."""
TINY_PATIENTS = 20

PROGRESSED = 140
"""Progression (a unit of its own, 25 to 346) above which a patient counts as progressed: about half of them."""
DIABETES_SITES = {"east": 0.4, "west": 0.35, "north": 0.25}
"""Share of the patients; the north has no blood lipids."""
CARDS = {
    "age": ("basics", {"card": "age"}),
    "sex": ("basics", {"categories": [1, 2]}),
    "bmi": ("basics", {"low": 12, "high": 60, "center": 26, "scale": 5, "unit": "kg/m2"}),
    "bp": ("basics", {"card": "bp_mean"}),
    "s1": ("lipids", {"low": 70, "high": 400, "center": 190, "scale": 38}),
    "s2": ("lipids", {"low": 20, "high": 300, "center": 115, "scale": 33}),
    "s3": ("lipids", {"low": 10, "high": 130, "center": 50, "scale": 14}),
    "s4": ("lipids", {"low": 1, "high": 12, "center": 4, "scale": 1.3}),
    "s5": ("blood", {"low": 2.5, "high": 7, "center": 4.7, "scale": 0.5}),
    "s6": ("blood", {"low": 30, "high": 300, "center": 95, "scale": 15}),
}
"""Modality and range of each variable: total, LDL and HDL cholesterol in mg/dL, their ratio, the logarithm of the
triglycerides, glucose; what is usual in adults, not what these patients have."""


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


def diabetes(folder: Path) -> Path:
    """The diabetes patients at three sites, at random; a study file, and a site file each."""
    from sklearn.datasets import load_diabetes

    found = load_diabetes(scaled=False)
    order = list(range(len(found.target)))
    random.Random(0).shuffle(order)
    (folder / "sites").mkdir(parents=True)
    start = 0.0
    for site, share in DIABETES_SITES.items():
        mine = order[round(start * len(order)) : round((start + share) * len(order))]
        start += share
        with (folder / f"{site}.csv").open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["patient", "progressed", *found.feature_names])
            writer.writerows(
                [f"p{at:03}", int(found.target[at] > PROGRESSED), *(float(value) for value in found.data[at])]
                for at in mine
            )
        held = {"basics", "blood", "lipids"} - ({"lipids"} if site == "north" else set())
        tables = {
            modality: {
                "file": f"../{site}.csv",
                "id": "patient",
                "columns": {name: name for name, (of, _) in CARDS.items() if of == modality},
            }
            for modality in sorted(held)
        }
        records = {
            "file": f"../{site}.csv",
            "id": "patient",
            "patient": "patient",
            "label": {"progressed": "progressed"},
        }
        content = {
            "version": 1,
            "name": site,
            "data": {"records": records, **tables},
            "cohort": f"diabetes-{site}",
            "state": f"../state/{site}",
        }
        (folder / "sites" / f"{site}.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    study = {
        "version": 1,
        "name": "diabetes",
        "task": {"kind": "binary", "label": "progressed"},
        "modalities": {
            modality: {
                "kind": "table",
                "columns": {name: card for name, (of, card) in CARDS.items() if of == modality},
            }
            for modality in ("basics", "blood", "lipids")
        },
        "model": {"embedding": 16, "fusion": "late", "imputer": "none"},
        "sharing": {"policy": "all"},
        "training": {"rounds": 20, "lr": 1.0},
        "privacy": {"enabled": True, "epsilon": 8, "delta": 1e-5},
        "preparation": {"class_balance": [0.5]},
        "evaluation": {"test_fraction": 0.2, "split_seed": 0},
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False), encoding="utf-8")
    return folder / "study.yaml"
