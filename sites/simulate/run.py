"""`gapweave simulate`: from study and site files to a run directory, on one machine."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from gapweave.client import app as client_app
from gapweave.client.joining import joining_check
from gapweave.client.participant import Participant
from gapweave.client.sources.files import Files
from gapweave.client.sources.findings import Finding
from gapweave.client.state import RunFolder
from gapweave.server.model_card import save_model
from gapweave.server.strategy import RoundLoop
from gapweave.shared.config import Site, Study, load_site
from gapweave.shared.config.simulation import LABEL_ATTACKS
from gapweave.shared.errors import DataError, GapweaveError, RefusedError, TooFewSites, Unreachable, UsageError
from gapweave.shared.files import intact, write_atomically
from gapweave.shared.rundir import RunDirectory
from gapweave.sites.simulate.attacks import HostileGrid, bad_names, mislabelled
from gapweave.sites.simulate.baselines import fit_baselines
from gapweave.sites.simulate.curve import Curve, Watcher
from gapweave.sites.simulate.grid import InlineGrid
from gapweave.sites.simulate.summary import summarise

ENGINES = ("inline", "ray")
"""Values of `--engine`: all sites in this process, or on Ray through Flower's simulation runtime."""

SHARED = 0.05
"""A larger share of a site's patients that is in another site's rows of one file looks like a copied site file."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a simulation needs beside its study; kept in the checkpoint, so that `resume` needs nothing.

    Paths inside the run directory are kept relative to it: it may be moved, with its sites' ledgers.

    Attributes:
        sites: site files.
        data: folder of data sets, or None.
        state: folder of the virtual sites' state.
        baselines: of `BASELINES`.
        continue_without: go on without sites whose data cannot be used.
        anchored: whether the state outlives the run, so that the site files' anchors of ledgers count.
        engine: of `ENGINES`.
        joining: whether each site makes the joining check at the end.
    """

    sites: tuple[Path, ...]
    data: Path | None
    state: Path
    baselines: tuple[str, ...] = ()
    continue_without: bool = False
    anchored: bool = False
    engine: str = "inline"
    joining: bool = False

    def save(self, directory: RunDirectory) -> None:
        """Write it where `load` finds it."""
        directory.checkpoint.mkdir(parents=True, exist_ok=True)

        def text_of(path: Path) -> str:
            return str(path.relative_to(directory.path) if path.is_relative_to(directory.path) else path)

        text = json.dumps(asdict(self), default=text_of, indent=1)
        write_atomically(directory.checkpoint / "simulation.json", text.encode())

    @classmethod
    def load(cls, directory: RunDirectory) -> Setup:
        """Read it.

        Raises:
            UsageError: when the folder is no simulation.
        """
        file = directory.checkpoint / "simulation.json"
        if not file.exists():
            raise UsageError(
                "this run was not simulated here", where=str(directory.path), remedy="Resume it at its server"
            )
        with intact(file):
            content = json.loads(file.read_text(encoding="utf-8"))
            return cls(
                sites=tuple(directory.path / path for path in content["sites"]),
                data=directory.path / content["data"] if content["data"] else None,
                state=directory.path / content["state"],
                baselines=tuple(content["baselines"]),
                continue_without=content["continue_without"],
                anchored=content["anchored"],
                engine=content["engine"],
                joining=content.get("joining", False),
            )


def find_sites(study_file: Path, folder: Path | None) -> tuple[Path, ...]:
    """The site files: those of `folder`, or of `sites/` beside the study.

    Raises:
        UsageError: when there is none, or two have one name.
    """
    where = folder or study_file.parent / "sites"
    files = tuple(sorted(path.resolve() for path in where.glob("*.yaml")))
    if not files:
        raise UsageError("there are no site files", where=str(where), remedy="Write one with `gapweave site init`")
    names: dict[str, Path] = {}
    for file in files:
        name = load_site(file).name
        if name in names:
            raise UsageError(f"two sites are called {name!r}", where=f"{names[name]} and {file}", remedy="Rename one")
        names[name] = file
    return files


@dataclass(frozen=True, kw_only=True)
class VirtualSite:
    """One site of a simulation.

    Attributes:
        file: its site file.
        site: what the file says.
        config: Flower's node configuration of it.
        participant: the same object that the ClientApp works with.
        error: the problem in its data that keeps it out, if any.
    """

    file: Path
    site: Site
    config: dict[str, Any]
    participant: Participant
    error: DataError | Unreachable | None = None


def load_sites(study: Study, setup: Setup, progress: Callable[[str], None] = lambda name: None) -> list[VirtualSite]:
    """Read every site's data before any work.

    Raises:
        DataError: the first site's problem, with the number of further ones, unless `continue_without` is set
            and the quorum is met.
        Unreachable: likewise, for a database that cannot be connected.
        TooFewSites: when there are fewer site files than the quorum; in one process no further site will come.
    """
    loaded = [_load_site(study, setup, file, progress) for file in setup.sites]
    errors = [entry.error for entry in loaded if entry.error is not None]
    usable = len(loaded) - len(errors)
    if errors and not (setup.continue_without and usable >= study.aggregation.quorum):
        more = f" (and problems at {len(errors) - 1} more sites)" if len(errors) > 1 else ""
        first, quorum = errors[0], study.aggregation.quorum
        if setup.continue_without:
            remedy = f"{first.remedy}; --continue-without needs {quorum} sites (study:aggregation.quorum)"
        else:
            joint = "? Or" if first.remedy.endswith("?") else ", or"
            remedy = f"{first.remedy.rstrip('?')}{joint} go on with --continue-without"
        raise type(first)(f"{first.what}{more}", where=first.where, remedy=remedy)
    if usable < study.aggregation.quorum:
        raise TooFewSites(
            f"{usable} sites are fewer than the quorum of {study.aggregation.quorum}",
            where="study:aggregation.quorum",
            remedy="Add site files, or plan with a smaller quorum",
        )
    _note_shared_patients([entry for entry in loaded if entry.error is None], setup)
    return loaded


def _note_shared_patients(usable: list[VirtualSite], setup: Setup) -> None:
    """Tell sites that read many patients of another one from the same file: each would spend its own budget on them."""
    read: dict[Path, list[VirtualSite]] = {}
    for entry in usable:
        if (path := entry.site.data.records.file) is None:
            continue
        try:
            place = Files(site_file=entry.file, data_dir=setup.data).find(path).resolve()
        except DataError:  # gone since it was read
            continue
        mine = set(entry.participant.cohort.patient_ids)
        for other in read.setdefault(place, []):
            both = len(mine.intersection(other.participant.cohort.patient_ids))
            if both > SHARED * min(len(mine), len(other.participant.cohort.patient_ids)):
                entry.participant.findings.append(
                    Finding(
                        id="shared",
                        status="warning",
                        where=f"{entry.file}:data.records",
                        message=f"{both} of {len(mine)} patients are of {other.site.name} too",
                        remedy="Name the site's own file, or its own rows by `where`",
                    )
                )
        read[place].append(entry)


def refuse_changed_data(directory: RunDirectory, sites: Mapping[str, Participant]) -> None:
    """Keep what the sites' data are when a run begins, and refuse to go on with others.

    Half a model of other records would be judged on patients that it was trained on.

    Raises:
        DataError: naming the sites whose data or site files changed.
    """
    file = directory.checkpoint / "data.json"
    now = {name: site.cohort.digest() for name, site in sites.items()}
    with intact(file):
        before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    changed = sorted(name for name, digest in now.items() if before.get(name, digest) != digest)
    if changed:
        raise DataError(
            f"the data or the site file of {', '.join(changed)} changed since the run began",
            where=str(directory.path),
            remedy="Put them back as they were, or start another run",
        )
    directory.checkpoint.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps({**now, **before}, indent=1).encode())


def _load_site(study: Study, setup: Setup, file: Path, progress: Callable[[str], None]) -> VirtualSite:
    site = load_site(file)
    progress(site.name)
    config = {
        "site": str(file),
        "state": str(setup.state / site.name),
        "data": str(setup.data or ""),
        "simulation": True,
        "anchored": setup.anchored,
    }
    participant = client_app.participant(config, study)
    error = None
    try:
        participant.cohort  # noqa: B018 - reads the data
    except (DataError, Unreachable) as problem:
        error = problem
    return VirtualSite(file=file, site=site, config=config, participant=participant, error=error)


def new_run_id() -> str:
    """Our own id of a run: time and four random bytes."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(4)}"


def _in_full(error: GapweaveError) -> GapweaveError:
    """The same error with what each site said to itself: a simulation may show it, a server never learns it."""
    texts = sorted(client_app.details.items())
    said = "; ".join(text if text.startswith(f"{site}:") else f"{site}: {text}" for site, text in texts)
    if not said:
        return error
    return type(error)(error.what, where=error.where, remedy=said)


def _mislabel(study: Study, usable: Mapping[str, Participant]) -> None:
    """Change the training labels of bad sites, where the attack is one on labels."""
    if study.simulation.attack in LABEL_ATTACKS:
        for name in bad_names(study, usable):
            site = usable[name]
            site.training = mislabelled(site.training, study.task, study.simulation.attack)


def _inline(
    study: Study,
    directory: RunDirectory,
    curve: Curve,
    configs: list[dict[str, Any]],
    usable: Mapping[str, Participant],
) -> RoundLoop:
    """All sites in this process, one after another; no deadline, since nobody else makes them wait."""
    grid = InlineGrid(client_app.app, configs)
    if study.simulation.attack != "none":
        grid = HostileGrid(client_app.app, configs, list(usable), study)
        _mislabel(study, usable)
    loop = RoundLoop(grid, study, directory, new_run_id(), curve, deadline_s=math.inf)
    curve.run = loop.state.run
    loop.run()
    return loop


def _on_ray(study: Study, directory: RunDirectory, curve: Curve, configs: list[dict[str, Any]]) -> RoundLoop:
    from gapweave.sites.simulate.ray_engine import on_ray

    loops: list[RoundLoop] = []

    def work(grid: Grid) -> None:
        loop = RoundLoop(grid, study, directory, new_run_id(), curve)
        curve.run = loop.state.run
        loops.append(loop)
        loop.run()

    on_ray(configs, work)
    return loops[0]


def _joined(
    study: Study, usable: Mapping[str, Participant], loop: RoundLoop, observer: Watcher
) -> dict[str, dict[str, Any]]:
    """Each site's joining check, as the hospital would make it; a simulation may look at all of them."""
    result = {}
    for name, site in usable.items():
        folder = RunFolder(site.state, loop.state.run)
        if (folder.path / "model.safetensors").exists():
            observer.baseline(f"joining check of {name}")
            result[name] = joining_check(study, site.cohort, folder)
    return result


def simulate(
    study: Study,
    setup: Setup,
    directory: RunDirectory,
    observer: Watcher,
    sites: list[VirtualSite] | None = None,
) -> dict[str, Any]:
    """Run or resume a simulation and write its run directory.

    Args:
        study: what all sites agree on.
        setup: the rest.
        directory: of the run; its checkpoint is continued if it has one.
        observer: progress.
        sites: as `load_sites` gave them, when they are loaded already.

    Returns:
        What was written to summary.json.

    Raises:
        GapweaveError: as the round loop raises it; what was done can be resumed. Before it, for data that changed.
    """
    sites = load_sites(study, setup) if sites is None else sites
    usable = {entry.site.name: entry.participant for entry in sites if entry.error is None}
    refuse_changed_data(directory, usable)
    curve = Curve(study, usable, directory, observer)
    configs = [entry.config for entry in sites if entry.error is None]
    try:
        if setup.engine == "ray":
            loop = _on_ray(study, directory, curve, configs)
        else:
            loop = _inline(study, directory, curve, configs, usable)
    except (RefusedError, TooFewSites) as error:
        raise _in_full(error) from None
    save_model(directory, study, loop.final, loop.peers)
    baselines = fit_baselines(
        study, {name: site.cohort for name, site in usable.items()}, list(setup.baselines), observer.baseline
    )
    joined = _joined(study, usable, loop, observer) if setup.joining else {}
    content = summarise(study, sites, loop, baselines, setup.engine, joined)
    directory.write_json("summary.json", content)
    return content
