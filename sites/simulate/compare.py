"""The work behind `compare`: check everything, run what is not done yet, and write OUT.

OUT/compare.json is what was asked for, OUT/cells/<hash>/ one simulation each; results.json, results.csv, summary.md
and the plots are written anew from the cells at the end.
"""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from gapweave.client import app as client_app
from gapweave.client.data import load_cohort
from gapweave.shared.config import load_site, naming_study
from gapweave.shared.errors import DataError, GapweaveError, RefusedError, TooFewSites, UsageError
from gapweave.shared.files import alone, intact, write_atomically
from gapweave.shared.metrics import METRICS
from gapweave.sites.simulate.compare_intervals import Draws
from gapweave.sites.simulate.compare_plan import Plan, Request, Trial, Unit, make_plan
from gapweave.sites.simulate.compare_plots import plot_auroc, plot_paired
from gapweave.sites.simulate.compare_statistics import Statistics, statistics_of
from gapweave.sites.simulate.compare_summary import cell_name, markdown
from gapweave.sites.simulate.compare_unit import (
    ROWS,
    SCORES,
    Baselines,
    Row,
    Scores,
    join_folds,
    load_scores,
    rows_of,
    run_unit,
)
from gapweave.sites.simulate.progress import progress_bars, say
from gapweave.sites.simulate.run import Setup, find_sites, load_sites
from gapweave.sites.study_check import check_study

SPEC, HOSPITALS = "compare.json", "hospitals"
COHORTS = "cohorts"
"""Of the specification: what the data were; not asked for, and the same whenever the comparison goes on."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A unit that could not be run, and why."""

    unit: str
    error: GapweaveError


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a comparison came to.

    Attributes:
        out: its folder.
        rows: of results.json.
        statistics: of summary.md.
        failures: units without rows; the same command tries them again.
    """

    out: Path
    rows: list[Row]
    statistics: Statistics
    failures: list[Failure]


def compare(request: Request) -> Result:
    """Run a comparison, or what is left of it.

    Raises:
        UsageError: when study, options and folder do not fit together; nothing was written.
        DataError: for a problem in a site's data; nothing was written.
    """
    with _study_file(request) as file:
        plan = make_plan(request, file)
        files = find_sites(file, request.sites)
        demo = request.study is None
        hashes = {(path.name if demo else str(path)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
        spec = plan.spec(hashes, request)
        out = request.out or Path(f"runs/compare-{plan.study}-{datetime.now():%Y%m%d-%H%M%S}").resolve()
        _check_out(out, spec)
        setup = Setup(
            sites=files,
            data=request.data,
            state=request.state or out,
            continue_without=request.continue_without,
            anchored=request.state is not None,
        )
        cohorts = check_data(plan, setup)
        _refuse_changed(out, cohorts)
        _write_json(out, SPEC, {**spec, COHORTS: cohorts})
        if demo and request.sites is None:
            setup = _keep_demo(file.parent, out, setup)
    with alone(out):
        failures = run_units(plan, setup, out)
        return write_results(plan, out, failures)


@contextmanager
def _study_file(request: Request) -> Iterator[Path]:
    """The study file; without one the demo, from its folder or written to a scratch folder."""
    if request.study is not None:
        with naming_study(request.study):
            yield request.study
        return
    kept = None if request.out is None else request.out / HOSPITALS / "study.yaml"
    if kept is not None and kept.exists():
        yield kept
        return
    from gapweave.sites.demo import write_demo

    with tempfile.TemporaryDirectory() as scratch:
        yield write_demo(Path(scratch).resolve() / HOSPITALS)


def _keep_demo(hospitals: Path, out: Path, setup: Setup) -> Setup:
    kept = out / HOSPITALS
    if hospitals != kept:
        arriving = out / f".{HOSPITALS}"
        shutil.rmtree(arriving, ignore_errors=True)
        shutil.move(hospitals, arriving)
        arriving.rename(kept)
    return Setup(**{**setup.__dict__, "sites": tuple(kept / path.relative_to(hospitals) for path in setup.sites)})


def _check_out(out: Path, spec: dict[str, Any]) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    file = out / SPEC
    if not file.exists():
        raise UsageError("the output folder exists", where=str(out), remedy="Give another --out")
    with intact(file):
        before, now = json.loads(file.read_text(encoding="utf-8")), json.loads(json.dumps(spec))
        before.pop(COHORTS, None)
    if before != now:
        keys = [key for key in spec if before.get(key) != now[key]]
        raise UsageError(
            f"the folder holds another comparison: {', '.join(keys)} differ",
            where=str(out),
            remedy="Give another --out, or ask for the same as before",
        )


def _refuse_changed(out: Path, cohorts: dict[str, list[str]]) -> None:
    """Refuse to go on with other data: folds of two cohorts would be judged, and trained on, as one.

    Raises:
        DataError: naming the sites.
    """
    file = out / SPEC
    with intact(file):
        before = json.loads(file.read_text(encoding="utf-8")).get(COHORTS, {}) if file.exists() else {}
        changed = sorted(name for name, hashes in cohorts.items() if before.get(name, hashes) != hashes)
    if changed:
        raise DataError(
            f"the data of {', '.join(changed)} changed since the comparison began",
            where=str(out),
            remedy="Put them back as they were, or give another --out",
        )


def check_data(plan: Plan, setup: Setup) -> dict[str, list[str]]:
    """Read every site's data once for each way in which the cells read them.

    Returns:
        By site, a hash of them for each way.

    Raises:
        UsageError: for a study that cannot be trained, or not at these sites.
        DataError: for a problem, or for a split column that does not hold each patient out in one fold.
        UsageError: when a site file and a study do not fit together.
    """
    seen, sites = set(), [load_site(file) for file in setup.sites]
    hashes: dict[str, list[str]] = {}
    try:
        for trial in plan.trials:
            study = trial.units[0].study
            if trial.seed == plan.trials[0].seed:
                for problem in check_study(study, sites):
                    say(f"warning: {cell_name(trial.cell)}: {problem}")
            read = study.model_dump(mode="json", include={"task", "modalities"})
            key = json.dumps([read, study.aggregation.quorum], sort_keys=True)
            if key not in seen:
                seen.add(key)
                for name, found in _check_trial(trial, setup).items():
                    hashes.setdefault(name, []).append(found)
    finally:
        client_app.forget()
    return hashes


def _check_trial(trial: Trial, setup: Setup) -> dict[str, str]:
    hashes = {}
    for entry in load_sites(trial.units[0].study, setup):
        if entry.error is None:
            hashes[entry.site.name] = entry.participant.cohort.digest()
        if entry.site.split.column is None or entry.error is not None or trial.units[0].fold is None:
            continue
        held_out = sum(
            load_cohort(unit.study, entry.site, site_file=entry.file, data_dir=setup.data).test.int()
            for unit in trial.units
        )
        if not bool((held_out == 1).all()):  # type: ignore[union-attr]
            raise DataError(
                f"the split column does not put every patient into one of folds 0 to {len(trial.units) - 1}",
                where=f"{entry.file}:split.column",
                remedy="Give --folds as many as the column has, or write `split: {by: hash}`",
            )
    return hashes


def run_units(plan: Plan, setup: Setup, out: Path) -> list[Failure]:
    """Run the units that have no rows yet, one after another.

    A unit that its sites refuse does not stop the others.
    """
    failures = []
    baselines = Baselines(plan.baselines, plan.joining)
    units = plan.units
    left = [unit for unit in units if not (_folder(out, unit) / ROWS).exists()]
    names = {unit.name: unit_name(trial, unit) for trial in plan.trials for unit in trial.units}
    with progress_bars(Console(stderr=True)) as bar:
        task = bar.add_task("", total=len(units), completed=len(units) - len(left))
        for unit in left:
            bar.update(task, description=names[unit.name])
            try:
                run_unit(unit, setup, _folder(out, unit), baselines)
            except (RefusedError, TooFewSites) as error:
                failures.append(Failure(unit=names[unit.name], error=error))
            bar.update(task, advance=1)
    return failures


def unit_name(trial: Trial, unit: Unit) -> str:
    """A unit, for people."""
    fold = "" if unit.fold is None else f" fold {unit.fold}"
    return f"{cell_name(trial.cell)} seed {unit.seed}{fold}"


def _folder(out: Path, unit: Unit) -> Path:
    return out / "cells" / unit.name


def write_results(plan: Plan, out: Path, failures: list[Failure]) -> Result:
    """Collect the rows of all finished trials and write everything that is read."""
    rows = [row for trial in plan.trials for row in trial_rows(trial, out)]
    statistics = statistics_of(rows, plan.vary, _draws(plan, out))
    done = [content for unit in plan.units if (content := _content(out, unit))]
    _write_json(out, "results.json", rows)
    _write_csv(out / "results.csv", rows, list(plan.vary))
    notes = [f"{failure.unit}: {failure.error}" for failure in failures]
    left_out = Counter(named for content in done for named in content.get("left_out", {}).items())
    notes += [
        f"{site}: left out of {number} of {len(done)} simulations: {why}" for (site, why), number in left_out.items()
    ]
    text = markdown(plan, statistics, seconds=sum(content["seconds"] for content in done), failures=notes)
    write_atomically(out / "summary.md", text.encode())
    plot_auroc(statistics, plan.vary, out / "auroc.svg")
    plot_paired(statistics, out / "paired.svg")
    return Result(out=out, rows=rows, statistics=statistics, failures=failures)


def _draws(plan: Plan, out: Path) -> Draws | None:
    """Resamples of all finished trials of a comparison with folds."""
    if plan.folds is None:
        return None
    draws = Draws(plan.trials[0].units[0].study.task.kind)
    for trial in plan.trials:
        if finished(trial, out):
            draws.add(trial.cell, trial.seed, out_of_fold_scores(trial, out))
    return draws


def finished(trial: Trial, out: Path) -> bool:
    """Whether all units of a trial have their rows."""
    return all((_folder(out, unit) / ROWS).exists() for unit in trial.units)


def out_of_fold_scores(trial: Trial, out: Path) -> dict[str, Scores]:
    """Out-of-fold scores by site, of a finished trial of a comparison with folds."""
    return join_folds([load_scores(_folder(out, unit) / SCORES) for unit in trial.units])


def trial_rows(trial: Trial, out: Path) -> list[Row]:
    """The rows of a cell and seed, of all folds; none unless all of its units are done."""
    contents = [_content(out, unit) for unit in trial.units]
    if not all(contents):
        return []
    rows = contents[0]["rows"]
    if trial.units[0].fold is not None:
        scores = out_of_fold_scores(trial, out)
        epsilon = {site: _largest([content["epsilon"].get(site) for content in contents]) for site in scores}
        rows = rows_of(trial.units[0].study, scores, epsilon, trial.seed, None)
    return [{"cell": trial.cell, **row} for row in rows]


def _largest(spent: list[float | None]) -> float | None:
    """The largest epsilon of a site's folds: each fold has its own ledger. None if one had no guarantee."""
    known = [value for value in spent if value is not None]
    return max(known) if len(known) == len(spent) else None


def _content(out: Path, unit: Unit) -> Any:
    file = _folder(out, unit) / ROWS
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _write_json(out: Path, name: str, content: Any) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / name, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def _write_csv(file: Path, rows: list[Row], keys: list[str]) -> None:
    plain = ("model", "seed", "fold", "site", "n_test", "positives")
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([*(f"cell.{key}" for key in keys), *plain, *METRICS, "epsilon"])
        for row in rows:
            cell = [row["cell"][key] for key in keys]
            metrics = [row["metrics"][name] for name in METRICS]
            writer.writerow([*cell, *(row[name] for name in plain), *metrics, row["epsilon"]])
