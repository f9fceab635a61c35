"""A service keeps its processes running, says how they are, and leaves nobody behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gapweave.shared.errors import GapweaveError, UsageError
from gapweave.shared.service import Service, own_environment

HOLDER = """
import sys
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
