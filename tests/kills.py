"""A federation that is killed: private runs in forked processes, stopped by a signal at a chosen system call.

What takes long, the imports and the sites' data, is done once, before the first fork (`forks.py`). A job runs to its end in a process of its own, and goes on where an
earlier one with the same name was stopped. `strace` counts its system calls, sends SIGKILL at one, or lets one fail:
SQLite writes in C, where nothing in Python could.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from commandline import edit, hospitals
from flwr.app import Message

from gapweave.client import participant as participant_module
from gapweave.client.data import Cohort, load_cohort
from gapweave.shared import wire
from gapweave.shared.config import load_site, load_study
from gapweave.shared.privacy import once
from gapweave.shared.report import run_report
from gapweave.sites.simulate import commands
from gapweave.sites.simulate import run as run_module
from gapweave.sites.simulate.commands import Places
from gapweave.sites.simulate.grid import InlineGrid

HOLDS = {"alder": ["labs", "vitals"], "birch": ["labs"]}
SITES = tuple(HOLDS)
COUNTED = ("birch",)
"""Sites that declare no number of patients: they release it with noise."""
ROUNDS = 3
CALLS = ("write", "pwrite64", "fsync", "fdatasync", "rename", "unlink", "ftruncate", "mkdir")
PR_SET_PTRACER, ANY = 0x59616D61, -1
STUDY: dict[str, Any] = {
    "training": {"rounds": ROUNDS, "local_steps": 1, "momentum": 0.9, "finetune": True, "finetune_steps": 1},
    "preparation": {"class_balance": "noisy"},
    "evaluation": {"epsilon": 0.5},
}
Child = Callable[[], None]


class LoggedGrid(InlineGrid):
    """The inline grid; what a site answers is written down before the server sees it."""

    log = Path()

    def _answer(self, message: Message) -> Message:
        asked, sent = wire.unpack(message.content)
        reply = super()._answer(message)
        header, arrays = wire.unpack(reply.content)
        config = self._contexts[message.metadata.dst_node_id].node_config
        kind = message.metadata.message_type
        line = {
            "kind": kind,
            "run": asked["run"],
            "round": asked.get("round"),
            "site": Path(config["site"]).stem,
            "header": header,
            "request": wire.request_hash(kind, asked, sent),
            "result": wire.request_hash(kind, header, arrays),
        }
        with self.log.open("ab", buffering=0) as file:
            file.write(json.dumps(line).encode() + b"\n")
        return reply


class Silent:
    """Shows no progress: bars would write at every moment of their own."""

    def __init__(self, console: object) -> None:
        pass

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def reading(self, site: str) -> None:
        """A site's data are being read."""

    def prepared(self, sites: int, rounds: int, done: int) -> None:
        """The handshake is over."""

    def replied(self, number: int, site: str) -> None:
        """A site answered."""

    def round_done(self, number: int, auroc: float | None) -> None:
        """A round is over."""

    def baseline(self, name: str) -> None:
        """A baseline is being fitted."""


class Federation:
    """Two hospitals whose data are in memory, and the places of each job.

    Args:
        folder: new; a job's files are in `folder/<job>`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.study = folder, hospitals(folder / "demo", holds=HOLDS, patients=40)
        edit(self.study, **STUDY)
        for name in SITES:
            file = folder / "demo" / "sites" / f"{name}.yaml"
            edit(file, policy={"epsilon": 60.0, "min_patients": 5})
            if name in COUNTED:
                edit(file, patients={"declared": None})
        self._cohorts = {name: self._read(name) for name in SITES}

    def _read(self, name: str) -> Cohort:
        file = self.folder / "demo" / "sites" / f"{name}.yaml"
        return load_cohort(load_study(self.study, {}), load_site(file), site_file=file)

    def patch(self) -> None:
        """Data from memory, a table of scores from little hospitals too, and a server that writes down what it got."""
        # Threads of the library that reads files do not outlive a fork.
        participant_module.load_cohort = lambda study, site, **_: self._cohorts[site.name]  # type: ignore[assignment]
        once.ENOUGH = 0.0
        run_module.InlineGrid = LoggedGrid  # type: ignore[attr-defined]
        commands.Bars = Silent  # type: ignore[assignment,misc]
        # The page is rebuilt from the run's files by `gapweave report`; its figures take longer than the run.
        run_report.write_report = lambda directory: None

    def prepare(self, job: str) -> Path:
        """The folder of a job: site files with an anchor each."""
        folder = self.folder / job
        if not folder.exists():
            shutil.copytree(self.folder / "demo" / "sites", folder / "sites")
            (folder / "anchors").mkdir()
            for name in SITES:
                edit(folder / "sites" / f"{name}.yaml", policy={"anchor": f"../anchors/{name}.json"})
        return folder

    def work(self, job: str, overrides: dict[str, Any] | None = None) -> None:
        """Start the run of a job, or resume it."""
        folder = self.prepare(job)
        LoggedGrid.log, run = folder / "wire.jsonl", folder / "run"
        if (run / "checkpoint" / "simulation.json").exists():
            commands.resume(run)
            return
        shutil.rmtree(run, ignore_errors=True)  # stopped before it was a run: one starts another
        places = Places(sites=folder / "sites", data=None, out=run, state=folder / "state")
        commands.start(self.study, overrides or {}, places, baselines=(), continue_without=False)


def strace(pid: int, out: Path, inject: str, calls: Sequence[str] = CALLS) -> subprocess.Popen[str]:
    """Attach to a stopped process."""
    options = ["-f", "-y", "-s", "5000", "-o", str(out), "-e", f"trace={','.join(calls)}", "-e", "signal=none"]
    tracer = subprocess.Popen(
        ["strace", *options, *(["-e", f"inject={inject}"] if inject else []), "-p", str(pid)],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert tracer.stderr is not None
    assert "attached" in tracer.stderr.readline()
    return tracer


def fork(work: Child, errors: Path) -> int:
    """Start a process that waits, stopped; its exit code is 0, or 1 after an error that it writes down."""
    pid = os.fork()
    if pid:
        os.waitpid(pid, os.WUNTRACED)
        return pid
    ctypes.CDLL(None).prctl(PR_SET_PTRACER, ANY, 0, 0, 0)  # where only ancestors may trace
    os.kill(os.getpid(), signal.SIGSTOP)
    try:
        work()
    except BaseException:
        errors.write_text(traceback.format_exc(), encoding="utf-8")
        os._exit(1)
    os._exit(0)


def perform(federation: Federation, job: dict[str, Any]) -> dict[str, Any]:
    """One process of a job.

    Args:
        federation: of this server.
        job: `name`; `overrides` of the study; `trace`: whether to list the system calls, else `inject`: what strace injects, or `after`: seconds
            after which the process is killed.

    Returns:
        `code` (negative: the signal that ended it), `seconds`, `trace`: the file of system calls or None.
    """
    folder = federation.prepare(job["name"])
    errors = folder / "error.txt"
    errors.unlink(missing_ok=True)
    pid = fork(lambda: federation.work(job["name"], job.get("overrides")), errors)
    traced = job.get("inject") or job.get("trace")
    out = folder / f"trace-{pid}.txt"
    tracer = strace(pid, out, job.get("inject", "")) if traced else None
    start = time.monotonic()
    os.kill(pid, signal.SIGCONT)
    if "after" in job:
        descriptor = os.pidfd_open(pid)
        ended, _, _ = select.select([descriptor], [], [], job["after"])
        os.close(descriptor)
        if not ended:
            os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    seconds = time.monotonic() - start
    if tracer is not None:
        tracer.communicate()
    code = os.waitstatus_to_exitcode(status)
    error = errors.read_text(encoding="utf-8") if errors.exists() else ""
    return {"code": code, "seconds": seconds, "trace": str(out) if tracer else None, "error": error}
