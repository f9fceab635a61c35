"""The work behind `simulate` and `resume`: every check comes first, then the folder, then the run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from gapweave.client import app as client_app
from gapweave.client.sources.findings import warnings_of
from gapweave.shared.config import Study, load_site, load_study, naming_study
from gapweave.shared.config.base import nearest
from gapweave.shared.config.overrides import parse_assignment
from gapweave.shared.errors import RefusedError, UsageError
from gapweave.shared.files import alone
from gapweave.shared.rundir import RunDirectory
from gapweave.sites.simulate.baselines import BASELINES
from gapweave.sites.simulate.progress import Bars, say
from gapweave.sites.simulate.run import ENGINES, Setup, VirtualSite, find_sites, load_sites, simulate
from gapweave.sites.study_check import check_study


@dataclass(frozen=True, kw_only=True)
class Places:
    """Folders given on the command line; None means the default."""

    sites: Path | None
    data: Path | None
    out: Path | None
    state: Path | None


OPTIONS = {"rounds": "training.rounds", "seed": "seed"}
"""Study keys that have an option of their own beside `--set`."""


def read_assignments(texts: list[str], **named: Any) -> dict[str, Any]:
    """`--set` options as overrides, with keys that have an option of their own.

    Args:
        texts: of `--set`.
        named: by option (`rounds`, `seed`) its value, None where it was not given.

    Raises:
        UsageError: for a key that is given in both ways, with two values.
    """
    overrides = dict(parse_assignment(text) for text in texts)
    for option, value in named.items():
        key = OPTIONS[option]
        if value is not None and overrides.setdefault(key, value) != value:
            raise UsageError(
                f"{key} is given twice: {value} and {overrides[key]}",
                where=f"--{option}, --set",
                remedy="Leave one of the two out",
            )
    return overrides


def read_baselines(text: str) -> tuple[str, ...]:
    """`--baselines` as names.

    Raises:
        UsageError: for an unknown one.
    """
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if names == ("none",):
        return ()
    for name in names:
        if name not in BASELINES:
            raise UsageError(f"no baseline is called {name!r}", where="--baselines", remedy=nearest(name, BASELINES))
    return names


def check_engine(name: str) -> None:
    """Refuse engines that this version does not have, or whose packages are missing.

    Raises:
        UsageError: naming those that it has.
    """
    if name not in ENGINES:
        raise UsageError(f"no engine is called {name!r}", where="--engine", remedy=nearest(name, ENGINES))
    if name == "ray":
        from gapweave.sites.simulate.ray_engine import require_ray

        require_ray()


def state_folder(state: Path | None) -> Path | None:
    """`--state` as a path that stays what it is.

    Raises:
        UsageError: for a file.
    """
    if state is not None and state.exists() and not state.is_dir():
        raise UsageError("this is a file", where=f"--state {state}", remedy="Give a folder")
    return state.resolve() if state else None


def data_folder(data: Path | None) -> Path | None:
    """`--data` as a path that stays what it is.

    Raises:
        UsageError: for a folder that is not there.
    """
    if data is not None and not data.is_dir():
        raise UsageError("there is no such folder", where=f"--data {data}", remedy="Correct it, or leave it out")
    return data.resolve() if data else None


def start(
    study_file: Path | None,
    overrides: dict[str, Any],
    places: Places,
    *,
    baselines: tuple[str, ...],
    continue_without: bool,
    engine: str = "inline",
    joining: bool = False,
) -> tuple[dict[str, Any], Path]:
    """Check everything, create the run directory, run, and write the report.

    Returns:
        summary.json's content, and the run directory.
    """
    with tempfile.TemporaryDirectory() as scratch, naming_study(study_file or Path("study")):
        demo = study_file is None
        file = _demo(Path(scratch)) if study_file is None else study_file
        study = load_study(file, overrides)
        if engine == "ray" and study.simulation.attack != "none":
            raise UsageError(
                "attacks need all sites in one process", where="--engine ray", remedy="Simulate bad sites inline"
            )
        out = (places.out or Path("runs") / f"{study.name}-{datetime.now():%Y%m%d-%H%M%S}").resolve()
        RunDirectory.require_new(out)
        state = state_folder(places.state)
        files = find_sites(file, places.sites)
        for problem in check_study(study, map(load_site, files)):
            say(f"warning: {problem}")
        directory = RunDirectory(out)
        setup = Setup(
            sites=files,
            data=data_folder(places.data),
            state=state or directory.sites,
            baselines=baselines,
            continue_without=continue_without,
            anchored=state is not None,
            engine=engine,
            joining=joining,
        )
        if demo:
            setup = _keep_demo(file.parent, out, setup)
        return _run(study, setup, out)


def _demo(folder: Path) -> Path:
    from gapweave.sites.demo import write_demo

    return write_demo(folder / "hospitals")


def _keep_demo(hospitals: Path, out: Path, setup: Setup) -> Setup:
    """Move the demo's hospitals into the run directory, so that it can be resumed and looked at."""
    import shutil

    kept = out / "hospitals"
    out.mkdir(parents=True, exist_ok=True)
    shutil.move(hospitals, kept)
    sites = tuple(kept / file.relative_to(hospitals.resolve()) for file in setup.sites)
    return Setup(**{**setup.__dict__, "sites": sites})


def one_thread() -> None:
    """Let torch use one thread, unless OMP_NUM_THREADS says otherwise.

    Virtual sites' steps are milliseconds: handing them to several threads costs more than it wins, and many times
    more on a machine that is busy with other work.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(1)


def _run(study: Study, setup: Setup, out: Path) -> tuple[dict[str, Any], Path]:
    one_thread()
    with _resumable(RunDirectory(out)), Bars(Console(stderr=True)) as bars:
        sites = load_sites(study, setup, bars.reading)
        _warn(sites)
        directory = RunDirectory.create(out, study)
        with alone(out):
            setup.save(directory)
            return _finish(study, setup, directory, bars, sites)


@contextmanager
def _resumable(directory: RunDirectory) -> Iterator[None]:
    """Say how an interrupted run goes on, once there is something to go on with."""
    try:
        yield
    except KeyboardInterrupt:
        if directory.checkpoint.exists():
            said = f"`gapweave resume {directory.path}` goes on with this run"
            say(said)
        raise
    finally:
        client_app.forget()


def _warn(sites: list[VirtualSite]) -> None:
    """Say what `gapweave site check` would say, so that nobody trains on a wrong unit unawares."""
    for entry in sites:
        for finding in warnings_of(entry.participant.findings):
            remedy = f". {finding.remedy}" if finding.remedy else ""
            line = f"{finding.status}: {entry.site.name}: {finding.where}: {finding.message}{remedy}"
            say(line)


def _finish(
    study: Study, setup: Setup, directory: RunDirectory, bars: Bars, sites: list[VirtualSite] | None
) -> tuple[dict[str, Any], Path]:
    from gapweave.shared.report.run_report import write_report  # nothing before the end waits for it

    summary = simulate(study, setup, directory, bars, sites)
    write_report(directory)
    return summary, directory.path


def resume(path: Path) -> tuple[dict[str, Any], Path]:
    """Continue an interrupted simulation.

    Raises:
        UsageError: when the folder holds no simulation, or one that is done.
    """
    directory = RunDirectory.open(path.resolve())
    study, setup = directory.study(), Setup.load(directory)
    one_thread()
    with alone(directory.path), _resumable(directory), Bars(Console(stderr=True)) as bars:
        if (directory.path / "summary.json").exists():
            raise UsageError("this run is done", where=str(path), remedy="Start another with `gapweave simulate`")
        sites = load_sites(study, setup, bars.reading)
        return _finish(study, setup, directory, bars, sites)


__all__ = [
    "Places",
    "RefusedError",
    "check_engine",
    "read_assignments",
    "read_baselines",
    "resume",
    "start",
    "state_folder",
]
