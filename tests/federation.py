"""A whole federation on one machine: a hub and hospitals, each on a host of its own, by the commands that people type.

`make federation` runs it: python tests/federation.py [--out DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from databases import PASSWORD, Postgres, running_postgres
from dicoms import as_dicom
from networks import Network, available
from omop import write_cdm

from gapweave.shared import tensorfile
from gapweave.shared.config import load_site, load_study
from gapweave.sites.demo import hospital_names, write_demo

GAPWEAVE = str(Path(sys.executable).with_name("gapweave"))
PORT = 9092


class Federation:
    """A hub and hospitals of the demo, on hosts of their own.

    Args:
        folder: of everything.
        sites: number of hospitals.
        patients: of each.
        settings: of the study, as `--set` takes them.
    """

    def __init__(self, folder: Path, sites: int, settings: dict[str, Any], patients: int = 300) -> None:
        self.folder, self.settings = folder, settings
        self.names = hospital_names(sites)
        self.study = write_demo(folder / "demo", hospitals=sites, patients=patients)
        self.network = Network(["hub", *self.names], folder)
        self.hub = folder / "hub" / "hub"
        self.environment = {
            "XDG_CONFIG_HOME": str(folder / "hub" / "config"),
            "OMP_NUM_THREADS": "1",
            "GAPWEAVE_HUB": str(self.hub),
        }

    def site_file(self, name: str) -> Path:
        return self.study.parent / "sites" / f"{name}.yaml"

    def state(self, name: str) -> Path:
        file = self.site_file(name)
        return (file.parent / load_site(file).state).resolve()

    def words(self, settings: dict[str, Any] | None = None) -> list[str]:
        chosen = self.settings if settings is None else settings
        return [word for key, value in chosen.items() for word in ("--set", f"{key}={json.dumps(value)}")]

    def on(self, host: str, *words: str, seconds: float = 180, code: int | None = 0) -> str:
        """Type a command on a host; its exit code must be as said."""
        done = self.network.run(host, [GAPWEAVE, *words], self.environment, seconds)
        text = done.stdout + done.stderr
        assert code is None or done.returncode == code, f"{host}: gapweave {' '.join(words)}: {done.returncode}\n{text}"
        return done.stdout if code == 0 else text

    def __enter__(self) -> Federation:
        self.network.__enter__()
        try:
            self.set_up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            self.network.run(name, [GAPWEAVE, "site", "stop", str(self.site_file(name))], self.environment)
        self.network.run("hub", [GAPWEAVE, "server", "stop"], self.environment)
        self.network.__exit__()

    def set_up(self) -> None:
        """What each side does once."""
        self.hub.parent.mkdir(parents=True, exist_ok=True)
        self.on("hub", "server", "init", "--host", "hub.test", "--port", str(PORT))
        for name in self.names:
            file = self.site_file(name)
            shutil.copy(self.hub / "connection.yaml", self.study.parent / "connection.yaml")
            self.on(name, "site", "init", str(file.with_name(f"new-{name}.yaml")), "--study", str(self.study))
            file.with_name(f"new-{name}.yaml").unlink()
            for suffix in ("key", "pub"):
                file.with_name(f"new-{name}.{suffix}").rename(file.with_suffix(f".{suffix}"))
            self.change(name, server={"connection": "../connection.yaml", "key": f"{name}.key"})
            self.on("hub", "server", "add-site", name, "--key", str(file.with_suffix(".pub")))
            self.on(name, "site", "approve", str(file), "--study", str(self.study), *self.words())

    def into_omop(self, name: str, cluster: Postgres) -> None:
        """Put a hospital's tables and notes into PostgreSQL, as an OMOP CDM that its site may only read."""
        file, database = self.site_file(name), f"cdm_{name}"
        content = write_cdm(cluster.create(database), file, "cdm54")
        password = file.with_name(f"{name}.password")
        password.write_text(PASSWORD)
        password.chmod(0o600)
        url = cluster.socket_url("reader", database)
        content["data"]["database"] = {"url": url, "password_file": password.name, "cdm": "cdm54"}
        file.write_text(yaml.safe_dump(content, sort_keys=False))

    def into_dicom(self, name: str) -> None:
        """Turn a hospital's pictures into DICOM files."""
        file = self.site_file(name)
        content = yaml.safe_load(file.read_text())
        scans = content["data"]["scan"]
        as_dicom(file.parent / scans["folder"], file.parent / f"{scans['folder']}-dicom")
        scans["folder"] = f"{scans['folder']}-dicom"
        records = file.parent / content["data"]["records"]["file"]
        records.write_text(records.read_text().replace(".png", ".dcm"))
        file.write_text(yaml.safe_dump(content, sort_keys=False))

    def change(self, name: str, **keys: Any) -> None:
        """Edit a site file."""
        file = self.site_file(name)
        content = yaml.safe_load(file.read_text())
        for key, value in keys.items():
            content[key] = {**content.get(key, {}), **value} if isinstance(value, dict) else value
        file.write_text(yaml.safe_dump(content, sort_keys=False))

    def start(self, hosts: Sequence[str] | None = None) -> None:
        """Start the hub and the hospitals."""
        self.on("hub", "server", "start")
        for name in self.names if hosts is None else hosts:
            self.on(name, "site", "start", str(self.site_file(name)))

    def submit(self, settings: dict[str, Any] | None = None, code: int | None = 0) -> str:
        text = self.on("hub", "submit", str(self.study), "--json", *self.words(settings), code=code)
        return str(json.loads(text)["run"]) if code == 0 else text

    def state_of(self, run: str) -> dict[str, Any]:
        return next(state for state in json.loads(self.on("hub", "runs", "--json")) if state["run"] == run)

    def wait(self, run: str, seconds: float, until_round: int | None = None) -> dict[str, Any]:
        """Until a run is over, or a round of it is done."""
        deadline, asked = time.monotonic() + seconds, 0.0
        files = [self.directory(run) / name for name in ("report.html", "failure.json")]
        while time.monotonic() < deadline:
            if until_round is not None and len(self.rounds(run)) >= until_round:
                return {"round": until_round}
            # To ask costs a process, which here takes time from those that are waited for.
            if until_round is None and (time.monotonic() - asked > 10 or any(file.exists() for file in files)):
                asked, state = time.monotonic(), self.state_of(run)
                if state["status"] not in ("pending", "starting", "running"):
                    return state
                time.sleep(1)
            time.sleep(0.5)
        raise TimeoutError(f"{self.state_of(run)}\n{self.logs()}")

    def directory(self, run: str) -> Path:
        return self.hub / "runs" / run

    def rounds(self, run: str) -> list[dict[str, Any]]:
        file = self.directory(run) / "rounds.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def site_status(self, name: str) -> dict[str, Any]:
        text = self.on(name, "site", "status", str(self.site_file(name)), "--json", code=None)
        return dict(json.loads(text[: text.rindex("}") + 1]))

    def process(self, host: str, child: str) -> int:
        """The process of a service."""
        folder = self.hub / "service" if host == "hub" else self.state(host) / "service"
        return int(json.loads((folder / "service.json").read_text())[child]["pid"])

    def kill(self, host: str, child: str) -> None:
        os.killpg(self.process(host, child), signal.SIGKILL)

    def logs(self) -> str:
        """The last lines of everybody."""
        files = [*self.hub.glob("service/logs/*.log")]
        files += [file for name in self.names for file in self.state(name).glob("service/logs/*.log")]
        return "\n".join(f"--- {file}\n" + "\n".join(file.read_text().splitlines()[-25:]) for file in files)


def shared_model(run: Path) -> dict[str, Any]:
    return tensorfile.parse((run / "model" / "shared.safetensors").read_bytes())[0]


def distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    assert one.keys() == other.keys()
    return max(float(np.abs(one[group][name] - other[group][name]).max()) for group in one for name in one[group])


def private_and_plain(folder: Path, say: Any = print) -> None:
    """A private study over five rounds, then one without noise, which is the inline engine's to 1e-6."""
    private = {"training.rounds": 5, "aggregation.deadline_s": 120}
    plain = {**private, "training.rounds": 2, "privacy.enabled": False, "sharing": "all"}
    federation = Federation(folder, 4, private)
    with running_postgres() as cluster:
        federation.into_omop("alder", cluster)
        federation.into_dicom("birch")
        with federation:
            _both(federation, folder, plain, say)


def _both(federation: Federation, folder: Path, plain: dict[str, Any], say: Any) -> None:
    begun = time.monotonic()
    federation.start()
    say(f"hub and {len(federation.names)} hospitals are up after {time.monotonic() - begun:.0f} s")
    run = federation.submit()
    state = federation.wait(run, 400)
    assert state["status"] == "completed", f"{state}\n{federation.logs()}"
    summary = json.loads((federation.directory(run) / "summary.json").read_text())
    assert summary["guarantee"].startswith("patient-level"), summary["guarantee"]
    assert {site["status"] for site in summary["sites"].values()} == {"ok"}
    seconds = [line["seconds"] for line in federation.rounds(run)]
    say(f"private study: {len(seconds)} rounds of {sum(seconds) / len(seconds):.1f} s")
    for name in federation.names:
        file = federation.site_file(name)
        budget = json.loads(federation.on(name, "site", "budget", str(file), "--json"))
        assert 0 < budget["epsilon"] <= budget["cap"], budget
        say(f"  {name}: epsilon {budget['epsilon']:.2f} of {budget['cap']:g}")
        # A test on data that need no protection, in a folder of its own: no ledger with a guarantee is ended.
        federation.on(name, "site", "stop", str(file))
        federation.change(name, policy={"unnoised": "allow"}, state=f"../plain/{name}")
        federation.on(name, "site", "approve", str(file), "--study", str(federation.study), *federation.words(plain))
        federation.on(name, "site", "start", str(file))
    run = federation.submit(plain)
    state = federation.wait(run, 300)
    assert state["status"] == "completed", f"{state}\n{federation.logs()}"
    federation.on("hub", "server", "stop")
    inline = folder / "inline"
    command = [GAPWEAVE, "simulate", str(federation.study), "--out", str(inline), *federation.words(plain)]
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    apart = distance(shared_model(inline), shared_model(federation.directory(run)))
    say(f"study without noise: at most {apart:.1e} from the inline engine's model")
    assert apart <= 1e-6
    assert distance(shared_model(inline), initial(federation, plain)) > 1e-3
    for name in federation.names:
        out = folder / f"{name}.csv"
        model = federation.state(name) / "runs" / run
        site = str(federation.site_file(name))
        federation.on(name, "predict", str(model), "--site", site, "--out", str(out))
        assert out.read_text().count("\n") > 100
    say("the hub is stopped, and every hospital predicts")
    for host in federation.network.hosts:
        foreign = federation.network.asked(host) - {"hub.test"}
        assert not foreign, f"{host} asked for {foreign}"
    say("nobody asked for a foreign name")


def initial(federation: Federation, settings: dict[str, Any]) -> dict[str, Any]:
    from gapweave.server.aggregation import initial_groups

    return dict(initial_groups(load_study(federation.study, settings)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    if not available():
        sys.exit("this machine makes no network namespaces: run it as root, with iproute2 installed")
    private_and_plain(options.out or Path(tempfile.mkdtemp(prefix="federation-")))


if __name__ == "__main__":
    main()
