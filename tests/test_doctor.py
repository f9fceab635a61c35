"""`site check` on planted problems: it names each with its remedy, and nothing else."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Callable
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import time
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from cohorts import LABS, Hospital, study
from commandline import run

from gapweave.client import doctor
from gapweave.client.checks import check_site, exit_code
from gapweave.client.keys import make_keys
from gapweave.client.ledger import Ledger
from gapweave.server.certificates import make_authority, make_server_certificate
from gapweave.shared import PROTOCOL_VERSION, __version__
from gapweave.shared.errors import NotIntact
from gapweave.shared.ports import free_port
from gapweave.shared.privacy.events import PrivacyEvent
from gapweave.shared.privacy.head import Head

STUDY = study({"labs": LABS}, privacy={"epsilon": 8.0})


class FakeHub:
    """What a hub tells of itself, over TLS, on loopback."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.about = json.dumps({"gapweave": __version__, "protocol": PROTOCOL_VERSION})
        self.ahead_s = 0.0
        make_authority(folder / "ca.crt", folder / "ca.key", "fake")
        self.hosts, self.days, self.tls = ["localhost"], 30.0, True

    def __enter__(self) -> FakeHub:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                content = hub.about.encode()
                self.send_response_only(200)
                self.send_header("Date", formatdate(time() + hub.ahead_s, usegmt=True))
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None:  # handshakes that a test breaks
                pass

        self._server = Quiet(("127.0.0.1", self.port), Handler)
        if self.tls:
            files = (self.folder / "server.crt", self.folder / "server.key")
            make_server_certificate(self.folder / "ca.crt", self.folder / "ca.key", self.hosts, *files, days=self.days)  # type: ignore[arg-type]
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*files)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class Place:
    """A hospital and a hub in good order, for a test to spoil."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch, self.study = folder, monkeypatch, STUDY
        self.hub = FakeHub(folder)
        self.hospital = Hospital(folder)
        self.hospital.records(900)
        self.hospital.labs(900, na=[140.0] * 900, sex=[0, 1] * 450)
        self.hospital.add("labs", file="labs.csv", columns={"sodium": "na", "sex": "sex"})
        self.hospital.update("policy", studies=[STUDY.sha256], epsilon=50.0)
        self.hospital.content["server"] = {"connection": "connection.yaml", "key": "north.key"}
        self.key = folder / "north.key"
        make_keys(self.key)
        self.state = folder / "state"
        self.connection: dict[str, Any] = {
            "version": 1,
            "name": "fake",
            "host": "localhost",
            "port": self.hub.port,
            "ca": (folder / "ca.crt").read_text(),
        }
        self.known = True
        # Whether Flower's own authentication lets a key in is shown with a real hub (test_federation.py).
        monkeypatch.setattr(doctor, "known_to_hub", lambda *_: self.known)
        for name in ("HTTPS_PROXY", "https_proxy"):
            monkeypatch.delenv(name, raising=False)

    def check(self, hub: bool = True) -> list[doctor.Finding]:
        file = self.folder / "connection.yaml"
        if self.connection:
            file.write_text(yaml.safe_dump(self.connection))
        self.hospital.site_file.write_text(yaml.safe_dump(self.hospital.content))
        if not hub:
            return check_site(self.study, self.hospital.site, self.hospital.site_file)
        with self.hub:
            return check_site(self.study, self.hospital.site, self.hospital.site_file)


def no_hub(place: Place) -> None:
    place.connection["port"] = free_port()


def another_authority(place: Place) -> None:
    other = place.folder / "other"
    other.mkdir()
    make_authority(other / "ca.crt", other / "ca.key", "other")
    place.connection["ca"] = (other / "ca.crt").read_text()


def another_name(place: Place) -> None:
    # The maker of certificates adds loopback's names itself: another one of this machine is not among them.
    place.connection["host"] = "127.0.0.2"
    place.monkeypatch.setattr(FakeHub, "__enter__", _on_another(FakeHub.__enter__))


def _on_another(enter: Callable[[FakeHub], FakeHub]) -> Callable[[FakeHub], FakeHub]:
    def entered(hub: FakeHub) -> FakeHub:
        original = ThreadingHTTPServer.server_bind

        def bind(server: ThreadingHTTPServer) -> None:
            server.server_address = ("127.0.0.2", hub.port)
            original(server)

        ThreadingHTTPServer.server_bind = bind  # type: ignore[method-assign]
        try:
            return enter(hub)
        finally:
            ThreadingHTTPServer.server_bind = original  # type: ignore[method-assign]

    return entered


def ledger(place: Place) -> Ledger:
    return Ledger(place.state, place.hospital.site)


def spent(place: Place) -> None:
    event = PrivacyEvent(
        kind="dp_sgd", noise_multiplier=2.0, sample_rate=1.0, steps=1, max_grad_norm=1.0, released="a test"
    )
    with ledger(place) as opened:
        opened.charge("run", "0" * 64, "1" * 64, event)
    place.hospital.update("policy", epsilon=1e-3)


def changed(place: Place) -> None:
    with ledger(place):
        pass
    import sqlite3

    with sqlite3.connect(place.state / "ledger.sqlite") as connection:
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type='trigger'").fetchall():
            connection.execute(f"DROP TRIGGER {name}")
        (table,) = connection.execute("SELECT name FROM sqlite_master WHERE type='table'").fetchone()
        connection.execute(f"UPDATE {table} SET body = replace(body, '50', '51')")
    connection.close()


PROBLEMS: dict[str, tuple[Callable[[Place], Any], str, int]] = {
    "no records": (lambda p: p.hospital.update("records", file="none.csv"), "records", 6),
    "the same id twice": (
        lambda p: p.hospital.records(900, id=["r0", *(f"r{n}" for n in range(899))]),
        "duplicates",
        6,
    ),
    "unknown labels": (lambda p: p.hospital.records(900, y=[0, 1, 2] * 300), "labels", 6),
    "a patient in train and test": (
        lambda p: (
            p.hospital.records(900, patient=[f"p{n // 2}" for n in range(900)], fold=["train", "test"] * 450),
            p.hospital.content.update(split={"column": "fold"}),
        ),
        "split",
        6,
    ),
    "a missing column": (lambda p: p.hospital.add("labs", file="labs.csv", columns={"sodium": "nat"}), "modality", 6),
    "no modality of the study": (lambda p: p.hospital.content["data"].pop("labs"), "modality", 6),
    "more patients than declared": (lambda p: p.hospital.update("patients", upper=100), "upper", 6),
    "too few patients": (lambda p: p.hospital.update("policy", min_patients=2000), "cohort", 6),
    "no connection file": (lambda p: p.connection.clear(), "connection", 5),
    "a broken connection file": (lambda p: p.connection.update(ca="nothing"), "connection", 5),
    "no key": (lambda p: p.key.unlink(), "key", 2),
    "the public part in place of the key": (
        lambda p: p.key.write_bytes(p.key.with_suffix(".pub").read_bytes()),
        "key",
        2,
    ),
    "a key that others read": (lambda p: p.key.chmod(0o644), "key", 2),
    "an unknown name": (lambda p: p.connection.update(host="no-such-host.invalid"), "name", 5),
    "no hub": (no_hub, "server", 5),
    "something else than a hub": (lambda p: setattr(p.hub, "about", "<html>"), "server", 5),
    "no TLS": (lambda p: setattr(p.hub, "tls", False), "tls", 5),
    "an expired certificate": (lambda p: setattr(p.hub, "days", -0.5), "tls", 5),
    "another authority": (another_authority, "tls", 5),
    "a certificate for another name": (another_name, "tls", 5),
    "another version": (
        lambda p: setattr(p.hub, "about", json.dumps({"gapweave": "9.8.7", "protocol": 99})),
        "version",
        5,
    ),
    "a clock that is ahead": (lambda p: setattr(p.hub, "ahead_s", -60.0), "clock", 5),
    "a clock that is behind": (lambda p: setattr(p.hub, "ahead_s", 400.0), "clock", 5),
    "a key that the hub does not know": (lambda p: setattr(p, "known", False), "authentication", 5),
    "no such GPU": (lambda p: p.hospital.content.update(device="cuda:7"), "device", 2),
    "a state folder open to others": (lambda p: p.state.mkdir(mode=0o755), "state", 2),
    "a full disk": (
        lambda p: p.monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=1e6)),
        "disk",
        2,
    ),
    "a ledger that was changed": (changed, "ledger", 3),
    "a cap that is spent": (spent, "budget", 3),
    "a study without noise": (
        lambda p: setattr(p, "study", study({"labs": LABS}, privacy={"enabled": False})),
        "plan",
        3,
    ),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    tmp_path.chmod(0o700)
    return Place(tmp_path, monkeypatch)


def test_a_site_in_good_order(place: Place) -> None:
    findings = place.check()
    assert [finding for finding in findings if finding.status == "problem"] == []
    assert exit_code(findings) == 0
    assert {"disk", "memory", "device", "ledger", "connection", "key", "server", "version", "clock"} <= {
        finding.id for finding in findings
    }
    assert next(finding for finding in findings if finding.id == "approval").status == "ok"


@pytest.mark.parametrize("name", PROBLEMS)
def test_planted_problems(place: Place, name: str) -> None:
    spoil, check, code = PROBLEMS[name]
    spoil(place)
    findings = place.check()
    problems = [finding for finding in findings if finding.status == "problem"]
    assert [finding.id for finding in problems] == [check], problems
    assert problems[0].remedy
    assert problems[0].where
    assert exit_code(findings) == code


def test_proxies_and_approvals_are_told(place: Place) -> None:
    place.monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    place.monkeypatch.setenv("NO_PROXY", "localhost")
    place.hospital.update("policy", studies=[])
    warnings = {finding.id for finding in place.check() if finding.status == "warning"}
    assert {"proxy", "approval"} <= warnings


def test_status_tells_a_changed_ledger_by_its_exit_code(place: Place) -> None:
    """Who watches exit codes saw "not connected" at most."""
    place.check(hub=False)
    run("site", "status", place.hospital.site_file, code=5)
    changed(place)
    told = run("site", "status", place.hospital.site_file, "--json", code=3)
    assert json.loads(told.out)["ledger"]["intact"] is False
    assert "intact: False" in run("site", "status", place.hospital.site_file, code=3).out


def test_what_a_server_remembers_and_the_ledger_lacks_is_told(place: Place) -> None:
    """Every request was refused for it, and the site's own check called the ledger intact."""
    place.check(hub=False)
    with ledger(place) as opened, pytest.raises(NotIntact):
        opened.check_echo(Head(site="north", length=99, hash="x"))
    findings = place.check(hub=False)
    told = next(finding for finding in findings if finding.id == "ledger")
    assert told.status == "problem"
    assert "the server has seen 99 entries" in told.message
    assert "gapweave site recover" in told.remedy


def test_status_of_a_ledger_that_gives_no_guarantee(place: Place) -> None:
    place.check(hub=False)
    with ledger(place) as opened:
        opened.charge("run", "0" * 64, "1" * 64, PrivacyEvent(kind="unnoised", noise_multiplier=0.0, released="a test"))
    assert "no guarantee of 50, intact:" in run("site", "status", place.hospital.site_file, code=5).out


def test_a_smaller_delta_than_the_ledgers_is_told(tmp_path: Path) -> None:
    """It was taken from the site file once, and what the file says later changed nothing, silently."""
    hospital = Hospital(tmp_path)
    with Ledger(tmp_path / "state", hospital.site):
        pass
    assert "delta" not in {one.id for one in doctor.check_budget(STUDY, hospital.site, tmp_path / "state", 100)}
    hospital.update("policy", delta=1e-8)
    found = {one.id: one for one in doctor.check_budget(STUDY, hospital.site, tmp_path / "state", 100)}
    assert found["delta"].status == "warning"
    assert "delta is 1e-05 since the ledger was opened" in found["delta"].message


def test_what_a_run_would_refuse_is_told_before_also_without_a_hub(tmp_path: Path) -> None:
    hospital = Hospital(tmp_path)
    hospital.records(40)
    hospital.labs(40)
    good = check_site(STUDY, hospital.site, hospital.site_file)
    assert exit_code(good) == 0
    hospital.update("policy", releases=["counts"], anchor="nowhere/head.json")
    found = {one.where.rpartition(":")[2]: one for one in check_site(STUDY, hospital.site, hospital.site_file)}
    assert found["policy.releases"].message == "the site releases no model updates"
    assert found["policy.anchor"].message == "the anchor's folder does not exist"
    assert found["policy.anchor"].status == "warning", "most simulations need none"
    assert exit_code(found.values()) == 3
    hospital.update("policy", releases=["update"], anchor=None)
    hospital.content["device"] = "cuda:93"
    (device,) = (one for one in check_site(STUDY, hospital.site, hospital.site_file) if one.id == "device")
    assert device.status == "problem"
    assert "there is no cuda:93" in device.message
