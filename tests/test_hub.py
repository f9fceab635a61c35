"""What `server init` makes, who is let in, and what is refused before anything starts."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import ssl
import stat
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from commandline import run
from cryptography import x509
from hospitals import plan_of

from gapweave.client.keys import make_keys
from gapweave.server import room, superlink
from gapweave.server.app import Watch
from gapweave.server.certificates import days_left, make_server_certificate
from gapweave.server.hub import Hub
from gapweave.server.proxy import CALLS, nginx
from gapweave.shared.config import load_study
from gapweave.shared.config.connection import load_connection
from gapweave.shared.errors import Unreachable, UsageError
from gapweave.shared.rundir import RunDirectory
from gapweave.sites.demo import write_demo

PORT = str(30443 + 10 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")))
"""Of this process of the tests: some listen on it."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("GAPWEAVE_HUB", str(tmp_path / "hub"))
    assert run("server", "init", "--host", "hub.example.org", "--host", "10.0.0.7", "--port", PORT).code == 0
    return Hub.find(None)


@contextmanager
def listening(port: int, shown: Hub | None = None) -> Iterator[None]:
    """Something listens on a port of the loopback, and shows a hub's certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if shown is not None:
        context.load_cert_chain(shown.certificate, shown.key)

    def answer() -> None:
        with suppress(OSError):
            while True:
                caller, _ = listener.accept()
                with suppress(OSError), caller, context.wrap_socket(caller, server_side=True):
                    pass

    with socket.create_server(("127.0.0.1", port)) as listener:
        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def test_what_is_made(hub: Hub) -> None:
    for name in ("ca.key", "server.key", "hub.yaml", "nginx.conf"):
        assert stat.S_IMODE((hub.folder / name).stat().st_mode) == 0o600, name
    assert stat.S_IMODE(hub.folder.stat().st_mode) == 0o700
    connection = load_connection(hub.connection)
    assert (connection.host, connection.port) == ("hub.example.org", int(PORT))
    assert "PRIVATE" not in hub.connection.read_text()
    certificate = x509.load_pem_x509_certificate(hub.certificate.read_bytes())
    authority = x509.load_pem_x509_certificate(connection.ca.encode())
    certificate.verify_directly_issued_by(authority)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["hub.example.org", "localhost"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7", "127.0.0.1"]
    assert certificate.not_valid_before_utc < datetime.now(UTC)
    assert Hub.find("hub").folder == hub.folder
    assert "there is a hub already" in run("server", "init", code=2).err
    second = run("server", "init", "--dir", str(hub.folder.parent / "other"), "--name", "hub")
    assert f"--server hub meant {hub.folder} before" in second.err
    assert "error: --dir: there is no hub" in run("server", "status", "--dir", "nowhere", code=2).err


def test_a_hub_behind_a_router(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sites are told the public port, and nginx listens on the other; so do the SuperLink's own after it."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    words = ("--dir", str(tmp_path / "hub"), "--host", "hub.example.org", "--port", "443", "--listen-port", "30443")
    assert "connect to hub.example.org:443" in run("server", "init", *words).out
    hub = Hub.find(str(tmp_path / "hub"))
    assert load_connection(hub.connection).address == "hub.example.org:443"
    assert "listen 30443 ssl;" in hub.proxy.read_text()
    assert "server 127.0.0.1:30444;" in hub.proxy.read_text()
    assert (hub.config.control_port, hub.config.health_port) == (30444, 30445)


@pytest.mark.parametrize("host", ["bad host", "hub_!", "-x", ""])
def test_a_host_that_is_none(tmp_path: Path, host: str) -> None:
    made = tmp_path / "new"
    assert "--host" in run("server", "init", "--dir", str(made), "--host", host, code=2).err
    assert not made.exists()


@pytest.mark.parametrize(("name", "port"), [("port", 0), ("control_port", 1), ("health_port", 2)])
def test_a_port_that_another_program_has(hub: Hub, name: str, port: int) -> None:
    """It was taken for the hub's own, which then served nobody, and said that it does."""
    with listening(int(PORT) + port):
        found = run("server", "start", "--foreground", code=5).err
    assert f"hub.yaml:{name}: another program listens on port {int(PORT) + port}" in found


def test_a_hub_serves_when_all_of_it_answers_with_its_own_certificate(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Hub.create(tmp_path / "other", "other", ["localhost"], int(PORT))
    monkeypatch.setattr(superlink, "healthy", lambda port: True)
    monkeypatch.setattr(hub.service, "status", lambda: {"processes": {"superlink": {}, "proxy": {}}})
    assert superlink.silent(hub) == "superlink"
    with listening(hub.config.control_port, other):
        assert superlink.silent(hub) == "superlink"
    with listening(hub.config.control_port, hub):
        assert superlink.silent(hub) == "proxy"
        with listening(hub.listens):
            assert superlink.silent(hub) == "proxy"
        with listening(hub.listens, hub):
            assert superlink.silent(hub) is None
    monkeypatch.setattr(superlink, "healthy", lambda port: False)
    assert superlink.silent(hub) == "superlink"


def test_a_hub_without_room(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not started, says why whatever one asks, and a round that would fill its disk is not begun."""
    study = write_demo(tmp_path / "demo", hospitals=2, patients=40)
    monkeypatch.setattr(room, "free", lambda folder: room.LEAST - 1)
    for words in (["server", "start"], ["server", "status"], ["submit", str(study)], ["runs"]):
        assert "no space left: 50 MB are free, the hub needs 50 MB" in run(*words, code=5).err, words
    monkeypatch.setattr(room, "free", lambda folder: room.LEAST + 500)
    watch = Watch(RunDirectory(hub.runs), load_study(study))
    watch.starting(1, 100)
    with pytest.raises(Unreachable, match="no space left"):
        watch.starting(1, 101)


def test_a_superlink_ends_when_its_disk_is_full(tmp_path: Path) -> None:
    """And one that finds it full waits until it is not."""
    code = (
        "import sys, time; from pathlib import Path; from gapweave.server import room; place = Path(sys.argv[1]);"
        "room.LOOK_S = 0.05; room.free = lambda folder: 0 if (folder / 'full').exists() else 10**9;"
        "room.keep(place); (place / 'serves').touch(); time.sleep(60)"
    )
    (tmp_path / "full").touch()
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        time.sleep(1)
        assert process.poll() is None
        assert not (tmp_path / "serves").exists()
        (tmp_path / "full").unlink()
        deadline = time.monotonic() + 20
        while not (tmp_path / "serves").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (tmp_path / "full").touch()
        assert process.wait(20) == 1
        assert process.stdout is not None
        assert "ending" in process.stdout.read()


def test_a_certificate_is_renewed_before_it_ends(hub: Hub) -> None:
    before = hub.certificate.read_bytes()
    hub.renew()
    assert hub.certificate.read_bytes() == before
    make_server_certificate(hub.ca, hub.folder / "ca.key", ["x"], hub.certificate, hub.key, days=20)
    hub.renew()
    assert days_left(hub.certificate) > 300


@pytest.mark.parametrize("name", ["hub", "hub ü; $x {1}"])
def test_nginx_reads_its_configuration(hub: Hub, tmp_path: Path, name: str) -> None:
    try:
        program = nginx()
    except UsageError as error:
        pytest.skip(f"{error}")
    hub = Hub(hub.folder.rename(tmp_path / name))
    command = [program, "-t", "-p", f"{hub.folder}/", "-c", str(hub.proxy), "-e", "stderr"]
    (hub.folder / "service").mkdir()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "register-node" not in CALLS


def test_who_is_let_in(hub: Hub, tmp_path: Path) -> None:
    public = make_keys(tmp_path / "site.key")
    assert run("server", "add-site", "north", "--key", str(public)).code == 0
    assert run("server", "add-site", "north", "--key", str(public)).code == 0, "again changes nothing"
    assert hub.sites() == ["north"]
    other = make_keys(tmp_path / "other.key")
    same = tmp_path / "same.pub"
    same.write_bytes(public.read_bytes().strip() + b" another comment")
    for words, text in {
        ("north", str(other)): "another key",
        ("south", str(tmp_path / "none.pub")): "no such file",
        ("south", str(tmp_path / "site.key")): "private key",
        ("south", str(hub.ca)): "no public key",
        ("../south", str(public)): "no name of a site",
        ("south", str(same)): "the key of 'north'",
    }.items():
        assert text in run("server", "add-site", words[0], "--key", words[1], code=2).err
    assert run("server", "remove-site", "north").code == 0
    assert "no site 'north'" in run("server", "remove-site", "north", code=2).err


def test_without_a_hub_that_runs(hub: Hub, tmp_path: Path) -> None:
    study = write_demo(tmp_path / "demo", hospitals=2, patients=40)
    for words in (["submit", str(study)], ["runs"]):
        assert "does not answer" in run(*words, code=5).err
    assert "no run" in run("stop", "none", code=2).err
    assert run("server", "status", code=5).out.startswith("hub: does not serve")
    assert "what only a simulation may do" in run("submit", str(study), "--set", "missing_rate=0.5", code=2).err
    assert run("server", "stop").out == "the hub hub did not run\n"
    assert "there is no hub 'elsewhere'" in run("runs", "--server", "elsewhere", code=2).err


def test_run_directories_of_a_hub(hub: Hub) -> None:
    hub.note("b", {"submitted": "2026-01-02"})
    hub.note("a", {"submitted": "2026-01-03"})
    assert list(hub.noted()) == ["b", "a"]
    hub.write_registered({"north": 7})
    assert json.loads(hub.registry.read_text()) == {"north": 7}


def test_a_hub_waits_for_a_busy_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.supercore import sql_mixin

    monkeypatch.setattr(sql_mixin, "SQLITE_PRAGMAS", sql_mixin.SQLITE_PRAGMAS)
    superlink.wait_for_database()
    with closing(sqlite3.connect(tmp_path / "superlink.db")) as connection:
        sql_mixin._set_sqlite_pragmas(connection, None)
        assert connection.execute("PRAGMA busy_timeout").fetchone() == (1000 * superlink.LOCKED_S,)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


@pytest.mark.filterwarnings("ignore:No path_separator found:DeprecationWarning")  # Flower's own, of Alembic
def test_a_key_that_was_shut_out_can_be_let_in_again(tmp_path: Path) -> None:
    """Flower refused it for good, and with it every study that was submitted later."""
    from flwr.server.superlink.linkstate import LinkStateFactory
    from flwr.supercore.object_store import ObjectStoreFactory
    from flwr.superlink.federation import NoOpFederationManager

    database = tmp_path / "superlink.db"
    state = LinkStateFactory(str(database), NoOpFederationManager(), ObjectStoreFactory(str(database))).state()
    first, other = (state.create_node("", "", key, 30) for key in (b"key", b"other"))
    superlink.free_key(database, b"key")
    assert state.get_node_id_by_public_key(b"key") == first, "one that is let in stays"
    state.delete_node("", first)
    with pytest.raises(ValueError, match="already in use"):
        state.create_node("", "", b"key", 30)
    superlink.free_key(database, b"key")
    assert state.get_node_id_by_public_key(b"key") is None
    again = state.create_node("", "", b"key", 30)
    assert state.get_node_id_by_public_key(b"key") == again != first
    assert state.get_node_id_by_public_key(b"other") == other


def test_what_is_wrong_with_one_registration_does_not_end_the_others(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The thread died, and no site was let in or shut out from then on."""
    tries: list[int] = []
    over = threading.Event()

    def register(control: superlink.Control, stopping: threading.Event | None = None) -> None:
        tries.append(1)
        if len(tries) < 3:
            raise UsageError("the hub refuses (412)", remedy="none")
        if len(tries) < 4:
            raise ValueError("of a kind that nobody thought of")
        over.set()

    monkeypatch.setattr(superlink, "LOOK_S", 0.01)
    monkeypatch.setattr(superlink, "healthy", lambda port: True)
    monkeypatch.setattr(superlink.Control, "register", register)
    superlink.keep_registered(hub, over)
    assert len(tries) == 4
    assert capsys.readouterr().out.count("not all sites are registered: the hub refuses (412)") == 1


@pytest.mark.parametrize(
    ("status", "said"), [("running", "is stopped"), ("finished", "was over"), ("stopped", "was over")]
)
def test_stopping_a_run_that_is_over(hub: Hub, monkeypatch: pytest.MonkeyPatch, status: str, said: str) -> None:
    """Flower refuses that, and the hub's log, which it named, says nothing of it."""
    hub.note("r", {"submitted": "2026-01-02", "numbers": [7]})
    monkeypatch.setattr(superlink.Control, "runs", lambda _: {7: superlink.FlowerRun(number=7, status=status)})
    monkeypatch.setattr(superlink.Control, "stop", lambda _, number: number == 7)
    assert run("stop", "r").out == f"r {said}\n"


def test_all_runs_are_asked_for_not_the_newest_twenty(hub: Hub) -> None:
    """Flower's handler tells 20 by itself: an older run that still trained was said to have failed."""
    from flwr.proto.control_pb2 import ListRunsResponse

    asked: list[int] = []

    class Client:
        def ListRuns(self, request: Any) -> ListRunsResponse:
            asked.append(request.limit)
            return ListRunsResponse()

    control = superlink.Control(hub)
    control._client = Client()
    assert control.runs() == {}
    assert asked[0] > 10**6


def test_a_key_that_cannot_be_read_keeps_nobody_else_out(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_keys(tmp_path / "good.key")
    hub.add_site("good", tmp_path / "good.pub")
    (hub.keys / "by_hand.pub").write_text("half a key")
    registered: list[str] = []

    class Client:
        def RegisterNode(self, request: Any) -> Any:
            registered.append(request.name)
            return types.SimpleNamespace(node_id=7)

    monkeypatch.setattr(superlink.Control, "sites", lambda _: {})
    monkeypatch.setattr(superlink, "free_key", lambda database, key: None)
    hub.registry.write_text("{half")
    control = superlink.Control(hub)
    control._client = Client()
    with pytest.raises(UsageError, match="holds no public key") as error:
        control.register()
    assert "by_hand.pub" in error.value.where
    assert registered == ["good"]
    assert hub.registered() == {"good": 7}


def test_the_same_key_with_other_line_ends_is_the_same(hub: Hub, tmp_path: Path) -> None:
    make_keys(tmp_path / "site.key")
    hub.add_site("one", tmp_path / "site.pub")
    content = (tmp_path / "site.pub").read_bytes()
    (tmp_path / "mailed.pub").write_bytes(content.replace(b"\n", b"\r\n"))
    hub.add_site("one", tmp_path / "mailed.pub")


@pytest.mark.parametrize(("status", "goes_on"), [("ok", False), ("late", True), ("failed", True), ("refused", False)])
def test_a_completed_run_goes_on_where_a_site_did_not_get_the_model(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, status: str, goes_on: bool
) -> None:
    """They had paid for every round, and `resume`, which their own message named, refused."""
    directory = RunDirectory.create(hub.runs / "r", plan_of(private=True))
    sites = {"a": {"status": "ok", "rounds": 3}, "b": {"status": status, "rounds": 3}}
    directory.write_json("summary.json", {"sites": {**sites, "c": {"status": "late", "rounds": 0}}})
    hub.note("r", {"submitted": "2026-01-02", "numbers": [7], "study": "s", "sha256": "0", "rounds": 3})
    known = {7: superlink.FlowerRun(number=7, status="completed")}
    monkeypatch.setattr(superlink.Control, "runs", lambda _: known)
    monkeypatch.setattr(superlink.Control, "register", lambda _: None)
    monkeypatch.setattr(superlink.Control, "start", lambda _, config: 8)
    monkeypatch.setattr("gapweave.server.room.require", lambda folder: None)
    if goes_on:
        run("resume", "r", "--server", str(hub.folder))
        assert hub.noted()["r"]["numbers"] == [7, 8]
    else:
        assert "r is completed" in run("resume", "r", "--server", str(hub.folder), code=2).err


def test_nobody_reads_on() -> None:
    """As in `gapweave runs | head`."""
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "gapweave.shared.cli", "study", "cards"]
    with open(writes, "wb") as nobody:
        done = subprocess.run(command, stdout=nobody, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
