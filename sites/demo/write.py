"""Writing synthetic hospitals as files: a study, a site file each, and the data as a hospital holds them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import yaml
from PIL import Image

from gapweave.shared.errors import DataError, UsageError
from gapweave.sites.demo.dialect import Frames, local_sources, localise, plain_sources
from gapweave.sites.demo.generate import Cohort, draw_cohort
from gapweave.sites.demo.study import study_text
from gapweave.sites.demo.world import LABEL, LABS, MODALITIES, VITALS, World, hospital_names

_LOCAL_AT = 1
"""Position of the hospital that has its own names, units and codes."""


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is decided of a hospital before any patient is drawn."""

    at: int
    name: str
    holds: frozenset[str]
    patients: int
    missing: float

    @property
    def local(self) -> bool:
        return self.at == _LOCAL_AT


def write_demo(
    folder: Path,
    *,
    seed: int = 0,
    hospitals: int = 6,
    holds: Mapping[str, Collection[str]] | None = None,
    patients: int | Sequence[int] | None = None,
) -> Path:
    """Write the demo's hospitals.

    `folder` gets `study.yaml`, `sites/<name>.yaml` and `data/<name>/` with the files of the modalities that
    the hospital holds: `records.csv`, `vitals.parquet`, `scans/*.png`, `notes.csv`, `labs.csv`. The second
    hospital has its own column names, units and codes. `records.csv` has the column `oracle_p`, the record's
    true probability given all latents: the best that any model could know. It is no input.

    Args:
        folder: a new or empty folder.
        seed: of patients, devices and case mix; the world itself never changes.
        hospitals: how many, named by `hospital_names`; ignored when `holds` is given.
        holds: hospital -> modalities that it holds (default: six patterns, repeated).
        patients: of every hospital, or of each in turn (default: 250 to 800).

    Returns:
        The path of `study.yaml`.

    Raises:
        UsageError: when the folder is not empty or the arguments do not fit together.
    """
    world = World()
    plans = _plans(world, hospitals, holds, patients)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is not an empty folder", remedy="Name a new one")
    (folder / "sites").mkdir(parents=True, exist_ok=True)
    for plan in plans:
        cohort = draw_cohort(
            world, seed=seed, hospital=plan.at, patients=plan.patients, holds=plan.holds, missing=plan.missing
        )
        _write_data(folder / "data" / plan.name, cohort, plan)
        (folder / "sites" / f"{plan.name}.yaml").write_text(_site_text(plan), encoding="utf-8")
    study = folder / "study.yaml"
    study.write_text(study_text(world), encoding="utf-8")
    return study


def oracle(folder: Path) -> dict[str, list[float]]:
    """The true probability of every record, by hospital, in the order of `records.csv`.

    Raises:
        DataError: when the folder holds no demo.
    """
    found = sorted((folder / "data").glob("*/records.csv"))
    if not found:
        raise DataError(
            "no demo hospitals there",
            where=str(folder),
            remedy="Write them: python -m gapweave.sites.demo --out DIR",
        )
    return {path.parent.name: pl.read_csv(path)["oracle_p"].to_list() for path in found}


def _plans(
    world: World,
    hospitals: int,
    holds: Mapping[str, Collection[str]] | None,
    patients: int | Sequence[int] | None,
) -> list[_Plan]:
    names = hospital_names(hospitals) if holds is None else tuple(holds)
    if holds is None:
        holds = {name: world.holds[at % len(world.holds)] for at, name in enumerate(names)}
    if patients is None:
        patients = [world.patients[at % len(world.patients)] for at in range(len(names))]
    sizes = [patients] * len(names) if isinstance(patients, int) else list(patients)
    if not names or len(sizes) != len(names) or min(sizes) < 1:
        raise UsageError(
            f"{len(sizes)} numbers of patients for {len(names)} hospitals",
            remedy="Give one number, or one of at least 1 for each hospital",
        )
    return [
        _Plan(
            at=at, name=name, holds=_known(name, holds[name]), patients=sizes[at],
            missing=world.missing[at % len(world.missing)],
        )
        for at, name in enumerate(names)
    ]  # fmt: skip


def _known(hospital: str, holds: Collection[str]) -> frozenset[str]:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", hospital):
        raise UsageError(f"{hospital!r} is no name of a site", where="holds", remedy="Use letters and digits")
    unknown = sorted(set(holds) - set(MODALITIES))
    if unknown or not holds:
        found = f"{unknown[0]!r}" if unknown else "nothing"
        raise UsageError(
            f"{hospital} cannot hold {found}", where="holds", remedy=f"Choose from {', '.join(MODALITIES)}"
        )
    return frozenset(holds)


def _site_text(plan: _Plan) -> str:
    sources = local_sources if plan.local else plain_sources
    site: dict[str, Any] = {
        "version": 1,
        "name": plan.name,
        "data": sources(plan.name, plan.holds),
        "subgroups": {"sex": "gender" if plan.local else "sex"},
        "cohort": "demo",
        "state": f"../state/{plan.name}",
    }
    own = "; its tables have their own names, units and codes" if plan.local else ""
    return f"# A synthetic hospital of the demo{own}.\n" + yaml.safe_dump(site, sort_keys=False, width=110)


def _write_data(folder: Path, cohort: Cohort, plan: _Plan) -> None:
    folder.mkdir(parents=True)
    frames = _frames(cohort, plan)
    frames = localise(frames) if plan.local else frames
    frames["records"].write_csv(folder / "records.csv")
    if "vitals" in frames:
        frames["vitals"].write_parquet(folder / "vitals.parquet")
    if "labs" in frames:
        frames["labs"].write_csv(folder / "labs.csv")
    if "note" in frames:
        frames["note"].write_csv(folder / "notes.csv")
    if "scan" in plan.holds:
        (folder / "scans").mkdir()
        for row in cohort.present[:, MODALITIES.index("scan")].nonzero()[0].tolist():
            Image.fromarray(cohort.scans[row]).save(folder / "scans" / _scan_name(plan, row))


def _record_id(plan: _Plan, row: int) -> str:
    return f"{plan.name}-r{row:05d}"


def _scan_name(plan: _Plan, row: int) -> str:
    return f"{_record_id(plan, row)}.png"


def _frames(cohort: Cohort, plan: _Plan) -> Frames:
    """The hospital's tables under the study's own names; a record without a modality has no row there."""
    records = [_record_id(plan, row) for row in range(len(cohort.label))]
    here = {name: cohort.present[:, at] for at, name in enumerate(MODALITIES)}
    frames = {
        "records": pl.DataFrame({
            "record_id": records,
            "patient_id": [f"{plan.name}-p{number:05d}" for number in cohort.patient],
            "sex": ["M" if male else "F" for male in cohort.male],
            LABEL: cohort.label,
            "scan_file": [_scan_name(plan, row) if has else None for row, has in enumerate(here["scan"])],
            "oracle_p": cohort.oracle.round(6),
        }),
        "vitals": _vitals_frame(cohort, records),
        "labs": pl.DataFrame({"record_id": records} | dict(zip(sorted(LABS), cohort.labs.T, strict=True))),
        "note": pl.DataFrame({"record_id": records, "text": cohort.notes}),
    }  # fmt: skip
    frames["labs"] = frames["labs"].fill_nan(None)
    chosen = {"records": frames["records"]}
    for name in sorted(plan.holds - {"scan"}):
        kept = pl.Series(records).filter(pl.Series(here[name]))
        chosen[name] = frames[name].filter(pl.col("record_id").is_in(kept.implode()))
    return chosen


def _vitals_frame(cohort: Cohort, records: Sequence[str]) -> pl.DataFrame:
    """One row a record and hour; an hour without any value is absent."""
    hours = cohort.vitals.shape[1]
    flat = cohort.vitals.reshape(-1, len(VITALS))
    frame = pl.DataFrame(
        {
            "record_id": [record for record in records for _ in range(hours)],
            "hour": list(range(hours)) * len(records),
        }
        | dict(zip(sorted(VITALS), flat.T, strict=True))
    )
    return frame.fill_nan(None).filter(pl.any_horizontal(pl.col(*sorted(VITALS)).is_not_null()))
