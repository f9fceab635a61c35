"""A federation of real processes on hosts of their own, and what may happen to it.

Every study ends, or says within its deadline why not; budgets are right; nobody cleans up by hand.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from federation import Federation, private_and_plain
from networks import available

from gapweave.shared.privacy.ledger import read_ledger

pytestmark = [pytest.mark.long, pytest.mark.federation]
DEADLINE_S = 45
SETTINGS: dict[str, Any] = {
    "training.rounds": 3,
    "training.local_steps": 2,
    "aggregation.quorum": 1,
    "aggregation.deadline_s": DEADLINE_S,
}
PATIENT: dict[str, Any] = {**SETTINGS, "training.rounds": 2, "aggregation.deadline_s": 300}
"""For two studies at once: each site works for one at a time, and here all sites share two cores."""
REACTIVATION_S = 60
"""A site that was killed is let in again when the hub has not heard of it for so long."""
STARTING_S = 90
"""Until the server's process of a run is there, and the sites' first ones, on two cores."""


@pytest.fixture(scope="module", autouse=True)
def namespaces() -> None:
    if not available():
        message = "network namespaces cannot be made here: be root, and install iproute2 (packages.txt)"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Three hospitals with room in their budgets for every test of this file."""
    made = Federation(tmp_path_factory.mktemp("federation"), 3, SETTINGS, patients=150)
    with small_disk(made.state("cedar"), "300m"), small_disk(made.hub.parent, "300m"), made:
        for name in made.names:
            made.change(name, policy={"epsilon": 500.0}, patients={"declared": 120})
            file = str(made.site_file(name))
            made.on(name, "site", "approve", file, "--study", str(made.study), *made.words(PATIENT))
        made.start()
        yield made


@pytest.fixture
def healed(federation: Federation) -> Federation:
    """The federation with every site connected."""
    connected(federation, *federation.names)
    return federation


def connected(federation: Federation, *names: str, seconds: float = 150) -> None:
    """Wait until sites are, without help: a site that was killed is let in again after a minute."""
    deadline = time.monotonic() + seconds
    while not all(federation.site_status(name)["connected"] for name in names):
        assert time.monotonic() < deadline, federation.logs()
        time.sleep(3)


def longest(rounds: int) -> float:
    """The handshake, the rounds, the tables and the last message each wait for the deadline at most."""
    return (rounds + 3) * DEADLINE_S + STARTING_S


def budgets_are_right(federation: Federation, run: str) -> None:
    """Ledgers are whole, and hold a charge for each round that the server heard of, and at most one for any."""
    for name in federation.names:
        view = read_ledger(federation.state(name))
        assert view.intact
        charges = [entry.body for entry in view.entries if entry.kind == "charge" and entry.body["run"] == run]
        steps = [body for body in charges if body["event"]["kind"] == "dp_sgd"]
        heard = [line for line in federation.rounds(run) if line["sites"].get(name, {}).get("status") == "ok"]
        assert len(heard) <= len(steps) <= SETTINGS["training.rounds"] + 1, name
        assert len({body["request"] for body in charges}) == len(charges), f"{name}: one request was charged twice"


def test_a_private_study_then_one_without_noise_that_is_the_inline_one(tmp_path: Path) -> None:
    private_and_plain(tmp_path, say=lambda text: None)


def test_processes_that_are_killed(healed: Federation) -> None:
    """A site mid-round, and another site's ClientApp: the run goes on without them, and they come back."""
    run = healed.submit()
    healed.wait(run, longest(1), until_round=1)
    healed.kill("birch", "supernode")
    kill_client_app(healed.process("cedar", "supernode"))
    state = healed.wait(run, longest(3))
    assert state["status"] == "completed", f"{state}\n{healed.logs()}"
    lines = healed.rounds(run)
    assert [line["round"] for line in lines] == [1, 2, 3]
    assert all(line["sites"]["alder"]["status"] == "ok" for line in lines)
    missed = [
        line["sites"]["birch"] for line in lines if line["sites"].get("birch", {"status": "ok"})["status"] != "ok"
    ]
    assert missed
    assert all(site["reason"] for site in missed)
    connected(healed, *healed.names)
    budgets_are_right(healed, run)


def kill_client_app(supernode: int) -> None:
    """Kill the process of a message as soon as there is one: a child of the worker, which is a child of the SuperNode."""

    def children(parent: int) -> list[int]:
        found = subprocess.run(["pgrep", "-P", str(parent)], capture_output=True, text=True, check=False).stdout
        return [int(pid) for pid in found.split()]

    [worker] = children(supernode)
    deadline = time.monotonic() + DEADLINE_S
    while not (messages := children(worker)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(messages[0], signal.SIGKILL)


def failed_runs(federation: Federation) -> list[dict[str, Any]]:
    """Runs that failed; none while the hub does not answer."""
    done = federation.network.run("hub", gapweave("runs", "--json"), federation.environment)
    return [state for state in json.loads(done.stdout or "[]") if state["status"] == "failed"]


def test_a_server_that_is_killed(healed: Federation) -> None:
    """Its run fails, and says so; resumed, it goes on from the last checkpoint, and pays for no round twice.

    A site loses power with it, and is switched on minutes later.
    """
    run = healed.submit()
    healed.wait(run, longest(1), until_round=1)
    service, supernode = int(healed.site_status("cedar")["pid"]), healed.process("cedar", "supernode")
    healed.kill("hub", "superlink")
    os.kill(service, signal.SIGKILL)
    os.killpg(supernode, signal.SIGKILL)
    off = time.monotonic()
    deadline = time.monotonic() + 120
    while not (found := failed_runs(healed)):
        assert time.monotonic() < deadline, healed.logs()
        time.sleep(2)
    assert [state["run"] for state in found] == [run]
    assert "resume" in found[0]["reason"]
    done = len(healed.rounds(run))
    assert done >= 1
    time.sleep(max(0.0, REACTIVATION_S - (time.monotonic() - off)))
    assert not healed.site_status("cedar")["running"]
    healed.on("cedar", "site", "start", str(healed.site_file("cedar")))
    connected(healed, *healed.names)
    healed.on("hub", "resume", run, "--server", str(healed.hub))
    state = healed.wait(run, longest(3))
    assert state["status"] == "completed", f"{state}\n{healed.logs()}"
    assert [line["round"] for line in healed.rounds(run)] == [1, 2, 3]
    assert healed.rounds(run)[-1]["sites"]["cedar"]["status"] == "ok"
    budgets_are_right(healed, run)


def test_networks_that_are_cut(healed: Federation) -> None:
    """One for a minute, one for good: the run ends within its deadlines, with the third site."""
    run = healed.submit()
    healed.wait(run, longest(1), until_round=1)
    begun = time.monotonic()
    timer = healed.network.cut_for("birch", 60)
    healed.network.cut("cedar")
    try:
        state = healed.wait(run, longest(3))
        assert state["status"] == "completed", f"{state}\n{healed.logs()}"
        assert time.monotonic() - begun < longest(2)
        assert any(line["sites"]["cedar"]["status"] == "late" for line in healed.rounds(run))
        deadline = time.monotonic() + 100  # a site calls itself disconnected after 75 s without an answer
        while healed.site_status("cedar")["connected"]:
            assert time.monotonic() < deadline
            time.sleep(3)
        found = checked(healed, "cedar")
        assert {finding["id"] for finding in found if finding["status"] == "problem"} == {"server"}
    finally:
        timer.join()
        healed.network.mend("cedar")
    connected(healed, *healed.names)
    budgets_are_right(healed, run)


def test_two_studies_at_once(healed: Federation) -> None:
    runs = [healed.submit(PATIENT), healed.submit(PATIENT)]
    for run in runs:
        state = healed.wait(run, 600)
        assert state["status"] == "completed", f"{state}\n{healed.logs()}"
        budgets_are_right(healed, run)
        assert all(line["sites"][name]["status"] == "ok" for line in healed.rounds(run) for name in healed.names)


def test_a_site_is_started_once(healed: Federation) -> None:
    text = healed.on("birch", "site", "start", str(healed.site_file("birch")), code=2)
    assert "runs already" in text
    # A second one that is not told to look first changes nothing either.
    text = healed.on("birch", "site", "start", str(healed.site_file("birch")), "--foreground", code=2)
    assert "runs already" in text
    status = healed.site_status("birch")
    assert status["healthy"]
    assert status["connected"]
    assert "runs already" in healed.on("hub", "server", "start", code=2)


def checked(federation: Federation, name: str, file: Path | None = None) -> list[dict[str, Any]]:
    words = ("--study", str(federation.study), "--json")
    text = federation.on(name, "site", "check", str(file or federation.site_file(name)), *words, code=None)
    return list(json.loads(text[text.index("{") : text.rindex("}") + 1])["checks"])


def another(federation: Federation, name: str, key: str) -> Path:
    """A second site file of a hospital, with a key that it makes."""
    file = federation.site_file(name)
    other = file.with_name(f"{key}.yaml")
    content = file.read_text().replace(f"key: {name}.key", f"key: {key}.key").replace("state/", f"other-{key}/")
    federation.on(name, "site", "init", str(other))
    other.write_text(content)
    return other


def problems(federation: Federation, name: str, file: Path) -> dict[str, str]:
    found = checked(federation, name, file)
    return {finding["id"]: finding["remedy"] for finding in found if finding["status"] == "problem"}


def test_who_is_let_in(healed: Federation) -> None:
    """A site that is not registered, and one that has another key: neither is let in, and both are told."""
    stranger = another(healed, "birch", "stranger")
    assert problems(healed, "birch", stranger).keys() == {"authentication"}
    text = healed.on("birch", "site", "start", str(stranger), code=None)
    try:
        assert "not connected" in text
        assert json.loads(healed.on("hub", "server", "status", "--json"))["sites"].keys() == set(healed.names)
    finally:
        healed.on("birch", "site", "stop", str(stranger))
    # Once its key is let in, and as long as it is.
    healed.on("hub", "server", "add-site", "stranger", "--key", str(stranger.with_suffix(".pub")))
    deadline = time.monotonic() + 20
    while problems(healed, "birch", stranger):
        assert time.monotonic() < deadline
        time.sleep(1)
    healed.on("hub", "server", "remove-site", "stranger")
    deadline = time.monotonic() + 20
    while not problems(healed, "birch", stranger):
        assert time.monotonic() < deadline
        time.sleep(1)
    assert "another key" in healed.on(
        "hub", "server", "add-site", "birch", "--key", str(stranger.with_suffix(".pub")), code=2
    )


def test_clocks_and_certificates(healed: Federation) -> None:
    file = str(healed.site_file("birch"))
    words = ["site", "check", file, "--study", str(healed.study), "--json"]
    wrong = healed.network.run("birch", ["faketime", "+1 hour", *gapweave(*words)], healed.environment)
    found = json.loads(wrong.stdout)["checks"]
    assert [one["id"] for one in found if one["status"] == "problem"] == ["clock"], wrong.stdout + wrong.stderr
    assert wrong.returncode == 5
    expire(healed.hub)
    healed.on("hub", "server", "stop")
    nginx_only = healed.network.start("hub", ["nginx", "-p", f"{healed.hub}/", "-c", str(healed.hub / "nginx.conf")])
    try:
        time.sleep(1)
        found = checked(healed, "birch")
        bad = [one for one in found if one["status"] == "problem"]
        assert [one["id"] for one in bad] == ["tls"], bad
        assert "expired" in bad[0]["message"]
    finally:
        nginx_only.terminate()
        nginx_only.wait()
    # A start makes a new one, by the same authority: the sites need nothing new.
    healed.on("hub", "server", "start")
    connected(healed, *healed.names)
    assert not [one for one in checked(healed, "birch") if one["status"] == "problem"]


def gapweave(*words: str) -> list[str]:
    from federation import GAPWEAVE

    return [GAPWEAVE, *words]


def expire(hub: Path) -> None:
    """Give the hub a certificate that ended yesterday."""
    from gapweave.server.certificates import make_server_certificate

    make_server_certificate(
        hub / "ca.crt",
        hub / "ca.key",
        ["hub.test"],
        hub / "server.crt",
        hub / "server.key",
        days=-0.5,  # type: ignore[arg-type]
    )


def test_a_full_disk_at_a_site(healed: Federation) -> None:
    """It loses the run, and says so; with room again it takes part in the next one, and nobody cleans up."""
    with full(healed.state("cedar")):
        run = healed.submit()
        state = healed.wait(run, longest(3))
        assert state["status"] == "completed", f"{state}\n{healed.logs()}"
        # Its reason came by the wire: of the handshake, since nothing can be reserved on a full disk.
        summary = json.loads((healed.directory(run) / "summary.json").read_text())
        assert summary["sites"]["cedar"]["status"] != "ok", summary["sites"]
        assert all("cedar" not in line["sites"] for line in healed.rounds(run))
    connected(healed, *healed.names)
    run = healed.submit()
    assert healed.wait(run, longest(3))["status"] == "completed"
    assert any(line["sites"].get("cedar", {}).get("status") == "ok" for line in healed.rounds(run)), healed.logs()
    budgets_are_right(healed, run)


def test_a_full_disk_at_the_hub(healed: Federation) -> None:
    """It ends serving, and says why; with room again it serves by itself, and the run is resumed. No round is paid twice."""
    run = healed.submit()
    healed.wait(run, longest(1), until_round=1)
    with full(healed.hub.parent):
        deadline = time.monotonic() + DEADLINE_S
        while "no space left" not in (said := healed.on("hub", "runs", code=None)):
            assert time.monotonic() < deadline, said
            time.sleep(1)
        for words in (["server", "status"], ["submit", str(healed.study), *healed.words()]):
            assert "no space left" in healed.on("hub", *words, code=5)
    connected(healed, *healed.names)
    deadline = time.monotonic() + 120
    while not (found := failed_runs(healed)):
        assert time.monotonic() < deadline, healed.logs()
        time.sleep(2)
    assert "resume" in next(state["reason"] for state in found if state["run"] == run)
    healed.on("hub", "resume", run, "--server", str(healed.hub))
    state = healed.wait(run, longest(3))
    assert state["status"] == "completed", f"{state}\n{healed.logs()}"
    assert [line["round"] for line in healed.rounds(run)] == [1, 2, 3]
    budgets_are_right(healed, run)


@contextmanager
def full(folder: Path) -> Iterator[None]:
    """A small file system in which no byte is left."""
    filling = folder / "filling"
    with filling.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1024))
    try:
        yield
    finally:
        filling.unlink()


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "none", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
