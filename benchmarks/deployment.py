"""What a deployed round costs over an inline one: `make bench-deployment`. A hub and hospitals on this machine.

Prints one JSON line: seconds a round, bytes, peak memory of the hub and of one site, size of the database after it.
With --megabytes, a text modality of so many hashed words makes the shared parameters that large.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from gapweave.shared.config import load_site
from gapweave.shared.ports import free_port
from gapweave.shared.rundir import RunDirectory
from gapweave.sites.demo import hospital_names, write_demo

GAPWEAVE = str(Path(sys.executable).with_name("gapweave"))
LOOK_S = 0.2
MOST_BUCKETS = 262_144
"""Of a study's hashed words."""


def typed(*words: str, environment: dict[str, str]) -> str:
    """Run a command that must succeed."""
    done = subprocess.run([GAPWEAVE, *words], env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"gapweave {' '.join(words)}: {done.stdout}{done.stderr}")
    return done.stdout


class Memory:
    """The largest sum of memory of each supervisor's processes, looked at five times a second.

    Pages that several processes share count for each by its part (PSS, proc(5)): a site's fork from one another.
    """

    def __init__(self, supervisors: dict[str, int]) -> None:
        self.peaks = dict.fromkeys(supervisors, 0)
        self._supervisors, self._over = supervisors, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(LOOK_S):
            lines = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
            rows = [tuple(map(int, line.split())) for line in lines.splitlines()]
            for name, root in self._supervisors.items():
                family = {root}
                while grown := {pid for pid, parent in rows if parent in family} - family:
                    family |= grown
                self.peaks[name] = max(self.peaks[name], sum(map(used, family)))


def used(pid: int) -> int:
    """Bytes of memory of a process; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def prepare(folder: Path, sites: int, megabytes: float, overrides: dict[str, Any]) -> Path:
    """Hospitals of the demo, on synthetic data that need no protection, and their study."""
    study = write_demo(folder, hospitals=sites, patients=200)
    content = yaml.safe_load(study.read_text(encoding="utf-8"))
    for key, value in overrides.items():
        part, _, name = key.partition(".")
        content.setdefault(part, {})[name] = value
    if megabytes:
        numbers = megabytes * 1e6 / 4
        width = max(16, math.ceil(numbers / MOST_BUCKETS))
        content.setdefault("model", {})["embedding"] = width
        content["modalities"]["note"]["buckets"] = round(numbers / width)
    study.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return study


def main() -> None:
    """Run the study deployed, then inline, and print the line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=float, default=0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-deployment-"))
    environment = {"XDG_CONFIG_HOME": str(folder / "config"), "GAPWEAVE_HUB": str(folder / "hub")}
    overrides = {
        "training.rounds": options.rounds,
        "training.local_steps": 2,
        "privacy.enabled": False,
        "sharing.policy": "all",
        "aggregation.deadline_s": 600,
        "aggregation.quorum": options.sites,
    }
    study = prepare(folder / "demo", options.sites, options.megabytes, overrides)
    names = hospital_names(options.sites)
    files = {name: study.parent / "sites" / f"{name}.yaml" for name in names}
    typed("server", "init", "--host", "localhost", "--port", str(free_port()), environment=environment)
    for name, file in files.items():
        typed("site", "init", str(folder / f"{name}.yaml"), environment=environment)
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        content["server"] = {"connection": str(folder / "hub" / "connection.yaml"), "key": str(folder / f"{name}.key")}
        content["policy"] = {"unnoised": "allow"}
        file.write_text(yaml.safe_dump(content), encoding="utf-8")
        typed("server", "add-site", name, "--key", str(folder / f"{name}.pub"), environment=environment)
        typed("site", "approve", str(file), "--study", str(study), environment=environment)
    try:
        typed("server", "start", environment=environment)
        supervisors = {"hub": int((folder / "hub" / "service" / "service.lock").read_text())}
        for name, file in files.items():
            typed("site", "start", str(file), environment=environment)
            lock = file.parent / load_site(file).state / "service" / "service.lock"
            supervisors[name] = int(lock.read_text())
        memory = Memory(supervisors)
        state = json.loads(typed("submit", str(study), "--wait", "--json", environment=environment))
        memory.stop()
    finally:
        for file in files.values():
            typed("site", "stop", str(file), environment=environment)
        typed("server", "stop", environment=environment)
    database = sum(file.stat().st_size for file in (folder / "hub").glob("superlink.db*"))
    deployed = list(RunDirectory(folder / "hub" / "runs" / state["run"]).rounds())
    if absent := [name for one in deployed for name in names if one["sites"].get(name, {}).get("status") != "ok"]:
        sys.exit(f"these took no part in a round, so the figures would be of fewer sites: {sorted(set(absent))}")
    begun = time.perf_counter()
    typed("simulate", str(study), "--out", str(folder / "inline"), environment=environment)
    inline = list(RunDirectory(folder / "inline").rounds())
    line = {
        "sites": options.sites,
        "s_round": round(fmean(one["seconds"] for one in deployed), 2),
        "s_round_inline": round(fmean(one["seconds"] for one in inline), 3),
        "s_inline": round(time.perf_counter() - begun, 1),
        "mb_up_round": round(fmean(one["bytes_up"] for one in deployed) / 1e6, 2),
        "same_bytes": [one["bytes_up"] for one in deployed] == [one["bytes_up"] for one in inline],
        "mb_hub": round(memory.peaks.pop("hub") / 1e6),
        "mb_site": round(max(memory.peaks.values()) / 1e6),
        "mb_database": round(database / 1e6, 1),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
