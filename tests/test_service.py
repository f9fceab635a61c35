"""A service keeps its processes running, says how they are, and leaves nobody behind."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from gapweave.shared.errors import GapweaveError, UsageError
from gapweave.shared.files import private_folder
from gapweave.shared.service import Child, Service, _Supervisor, direct, own_environment

HOLDER = """
import sys
import threading
from pathlib import Path
from gapweave.shared import service
service.DELAYS_S = (0.2,)
folder, *command = sys.argv[1:]
service.Service(Path(folder), "the test").run(lambda: [service.Child(name="one", command=tuple(command))])
"""


def wait(ready: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def hold(folder: Path, code: str) -> subprocess.Popen[bytes]:
    """A service in a process of its own, whose one process runs some Python."""
    return subprocess.Popen([sys.executable, "-c", HOLDER, str(folder), sys.executable, "-u", "-c", code])


def child(service: Service) -> int | None:
    status = service.status()["processes"].get("one", {})
    return status.get("pid")


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_it_restarts_what_ends_and_stops_all(tmp_path: Path) -> None:
    service = Service(tmp_path / "service", "the test")
    holder = hold(service.folder, "print('\\x1b[92mhere'); import time; time.sleep(100)")
    try:
        wait(lambda: child(service))
        first = child(service)
        assert first is not None
        os.kill(first, signal.SIGKILL)
        wait(lambda: child(service) not in (None, first))
        assert service.status()["processes"]["one"]["restarts"] == 1
        assert service.status()["processes"]["one"]["last_exit"] == -signal.SIGKILL
        with pytest.raises(UsageError, match="runs already"):
            service.start([], lambda: True, 1)
        second = child(service)
        assert second is not None
        wait(lambda: "here" in service.log_file("one").read_text())
        assert "\x1b" not in service.log_file("one").read_text()
        assert service.log_file("one").stat().st_mode & 0o077 == 0
        assert service.stop()
        assert not alive(second)
        assert not service.stop()
        assert service.status() == {"running": False, "pid": None, "processes": {}}
    finally:
        holder.kill()
        holder.wait()


def test_processes_end_with_a_service_that_is_killed(tmp_path: Path) -> None:
    """Else the next start would find its ports taken, by processes that nobody watches."""
    service = Service(tmp_path / "service", "the test")
    holder = hold(service.folder, "import time; time.sleep(100)")
    wait(lambda: child(service))
    pid = child(service)
    assert pid is not None
    holder.kill()
    holder.wait()
    wait(lambda: not alive(pid))
    assert service.pid() is None


def test_a_process_that_ignores_the_request_to_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service(tmp_path / "service", "the test")
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf'); time.sleep(100)"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER.replace("DELAYS_S = (0.2,)", "STOPPING_S = 0.5"), str(service.folder),
         sys.executable, "-u", "-c", code]
    )  # fmt: skip
    wait(lambda: service.log_file("one").exists() and "deaf" in service.log_file("one").read_text())
    pid = child(service)
    assert service.stop()
    holder.wait()
    assert pid is not None
    assert not alive(pid)


def test_a_start_that_fails_says_why(tmp_path: Path) -> None:
    service = Service(tmp_path / "service", "the test")
    with pytest.raises(GapweaveError, match=r"ended at once: .*no site file"):
        service.start(["site", "start", str(tmp_path / "none.yaml"), "--foreground"], lambda: False, 20)


def test_processes_find_what_is_installed_beside_this_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that was started by its full path looked for `flower-superexec` for a minute."""
    monkeypatch.setenv("PATH", "/nowhere")
    assert shutil.which("flower-superexec") is None
    assert shutil.which("flower-superexec", path=own_environment()["PATH"]) is not None


@pytest.mark.parametrize(
    ("set_", "spared"),
    [({}, []), ({"NO_PROXY": "10.0.0.0/8"}, ["10.0.0.0/8"]), ({"no_proxy": ".local", "NO_PROXY": "x"}, [".local"])],
)
def test_a_proxy_is_for_what_leaves_the_machine(set_: dict[str, str], spared: list[str]) -> None:
    """Flower's own parts sent each other's messages to the proxy: a site waited for ever, and seemed connected."""
    found = direct(set_)
    assert found["no_proxy"] == found["NO_PROXY"] == ",".join([*spared, "127.0.0.1", "localhost"])
    with pytest.MonkeyPatch.context() as patch:
        for name in ("no_proxy", "NO_PROXY"):
            patch.delenv(name, raising=False)
        for name, value in {**set_, "https_proxy": "http://proxy:3128"}.items():
            patch.setenv(name, value)
        assert not urllib.request.proxy_bypass("127.0.0.1")
        for name, value in own_environment().items():
            patch.setenv(name, value)
        assert urllib.request.proxy_bypass("127.0.0.1")
        assert not urllib.request.proxy_bypass("hub.example.org")


def test_a_process_that_cannot_be_started_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No process more, for a moment: the thread that starts it died, and the service ran on with nothing."""
    service = Service(tmp_path / "service", "the test")
    private_folder(tmp_path / "service" / "logs")
    keeper = _Supervisor(service, [Child(name="one", command=("true",))], None)
    tries: list[int] = []

    def popen(*_: object, **__: object) -> None:
        tries.append(1)
        if len(tries) == 3:
            keeper._over.set()
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("gapweave.shared.service.DELAYS_S", (0.01,))
    monkeypatch.setattr(subprocess, "Popen", popen)
    keeper._keep(keeper._children[0])
    assert len(tries) == 3
    assert "cannot be started" in service.log_file("one").read_text()


def test_whoever_has_not_yet_said_who_it_is_is_not_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process was taken for number 0, and the signal went to all of the caller's own group."""
    service = Service(tmp_path, "the test")
    sent: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, _: sent.append(pid))
    with (tmp_path / "service.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert service.pid() is None
        assert not service.stop()
        later = threading.Timer(0.2, lambda: print(4711, file=file, flush=True))
        later.start()
        assert service.pid() == 4711
        later.join()
    assert not sent


def test_a_process_of_another_machine_is_not_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From another container with the same folder its number is somebody else's."""
    service = Service(tmp_path, "the test")
    sent: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, _: sent.append(pid))
    with service._locked(), monkeypatch.context() as elsewhere:
        elsewhere.setattr(socket, "gethostname", lambda: "the-other-one")
        assert service.pid() == os.getpid()
        with pytest.raises(UsageError, match="another machine or in another container"):
            service.stop()
    assert not sent


def test_whoever_only_looks_does_not_keep_it_from_starting(tmp_path: Path) -> None:
    service = Service(tmp_path, "the test")
    with (tmp_path / "service.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        later = threading.Timer(0.2, lambda: fcntl.flock(file, fcntl.LOCK_UN))
        later.start()
        with service._locked():
            assert service.pid() == os.getpid()
            with pytest.raises(UsageError, match=f"process {os.getpid()}"), service._locked():
                pass
        later.join()
    assert service.pid() is None
