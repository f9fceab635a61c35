"""A service: processes that are kept running, with a lock, a status file and rotated logs in one folder.

Both sides of a deployment use it; systemd or a container engine may watch over the whole of it in turn.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from gapweave.shared.errors import GapweaveError, Unreachable, UsageError
from gapweave.shared.files import private_folder, try_lock, write_atomically

DELAYS_S = (1.0, 5.0, 15.0, 60.0)
"""Waits before a restart, the last one for good: a site that was killed is let in again after 52 s (measured)."""
STEADY_S = 120.0
"""A process that ran this long starts over with the first wait."""
FAILING = 3
"""After so many restarts nobody waits any longer that a service gets ready."""
STOPPING_S = 15.0
"""How long a process may take to end before it is killed."""
MOMENT_S = 1.0
"""How long one process may have the lock only to look at it, or before it says who has it."""
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
LOG_BYTES, LOG_FILES = 5_000_000, 4

LOOPBACK = ("127.0.0.1", "localhost")

FLOWER = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Flower's own processes phone nobody and install nothing."""


def own_environment() -> dict[str, str]:
    """Variables of Flower's processes, which find each other by name: beside this Python, also when PATH lacks it."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**os.environ, **FLOWER, **direct(os.environ), "PATH": path}


def direct(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables by which processes of one machine find each other also where a proxy is set for all that goes out."""
    spared = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    return dict.fromkeys(("no_proxy", "NO_PROXY"), ",".join(filter(None, [spared, *LOOPBACK])))


@dataclass(frozen=True, kw_only=True)
class Child:
    """One process of a service.

    Attributes:
        name: of its log and in the status.
        command: program and arguments; no secret is among them, everybody on the machine can read them.
        environment: variables beside those of the service.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


class Service:
    """The folder of a service.

    Args:
        folder: for its lock, status and logs; created, and closed to others, when it starts.
        what: it is, for messages.
    """

    def __init__(self, folder: Path, what: str) -> None:
        self.folder, self.what = folder, what
        self._lock, self._status = folder / "service.lock", folder / "service.json"

    def log_file(self, child: str) -> Path:
        """Where a process writes; older ones have .1, .2 ... appended."""
        return self.folder / "logs" / f"{child}.log"

    def pid(self) -> int | None:
        """The process that runs the service, or None."""
        runner = self._runner()
        return int(runner[0]) if runner else None

    def _runner(self) -> list[str] | None:
        """The process that runs the service, and where it is one."""
        deadline = time.monotonic() + MOMENT_S
        with contextlib.suppress(FileNotFoundError), self._lock.open("r") as file:
            while not try_lock(file, fcntl.LOCK_SH):
                file.seek(0)
                text = file.read().strip()
                if text or time.monotonic() > deadline:  # who has just taken the lock has not yet written
                    return text.split() or None
                time.sleep(0.01)
        return None

    def status(self) -> dict[str, Any]:
        """`running`, `pid`, and by child: `pid`, `state`, `restarts`, `since`, `last_exit`."""
        pid = self.pid()
        children: dict[str, Any] = {}
        with contextlib.suppress(FileNotFoundError, ValueError):
            children = json.loads(self._status.read_text(encoding="utf-8")) if pid is not None else {}
        return {"running": pid is not None, "pid": pid, "processes": children}

    def run(
        self, children: Callable[[], Sequence[Child]], beside: Callable[[threading.Event], None] | None = None
    ) -> None:
        """Keep processes running until this one is told to end (SIGTERM or Ctrl-C); says so at both ends.

        Args:
            children: gives the processes, once nobody else runs the service; they are started at once, and again
                whenever they end, after a growing wait.
            beside: runs in a thread of its own; the event that it gets is set at the end.

        Raises:
            UsageError: when the service runs already.
        """
        private_folder(self.folder)
        private_folder(self.folder / "logs")
        with self._locked(), _for_the_owner_alone():
            kept = children()
            names = " and ".join(child.name for child in kept)
            print(f"{self.what} keeps {names} running; logs: {self.folder / 'logs'}", flush=True)
            _Supervisor(self, kept, beside).run()
            print(f"{self.what} is stopped", flush=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        deadline = time.monotonic() + MOMENT_S
        with self._lock.open("a+") as file:
            while not try_lock(file, fcntl.LOCK_EX):  # who asks whether it runs has it for a moment
                if time.monotonic() > deadline:
                    raise self._running()
                time.sleep(0.01)
            file.seek(0)
            file.truncate()
            file.write(f"{os.getpid()} {_machine()}\n")
            file.flush()
            try:
                yield
            finally:
                file.truncate(0)  # a pid that may be another process's by now

    def _running(self) -> UsageError:
        return UsageError(
            f"{self.what} runs already (process {self.pid()})", where=str(self.folder), remedy="Stop it first"
        )

    def write_status(self, children: Mapping[str, Any]) -> None:
        """Say how the processes are."""
        with contextlib.suppress(OSError):  # a full disk must not end what still works
            write_atomically(self._status, json.dumps(children).encode(), durable=False)

    def start(self, arguments: Sequence[str], ready: Callable[[], bool], seconds: float) -> bool:
        """Start the service in the background with a command of ours that runs it in the foreground.

        Args:
            arguments: of `gapweave`.
            ready: is asked until it agrees.
            seconds: how long.

        Returns:
            Whether it got ready in time; it goes on trying if not.

        Raises:
            UsageError: when it runs already.
            GapweaveError: when it ended at once.
        """
        if self.pid() is not None:
            raise self._running()
        private_folder(self.folder)
        private_folder(self.folder / "logs")
        log = self.log_file("service")
        command = [sys.executable, "-m", "gapweave.shared.cli", *arguments]
        with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if process.poll() is not None:
                lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no message"]
                raise GapweaveError(
                    f"{self.what} ended at once: {lines[-1].removeprefix('error: ')}",
                    where=str(log),
                    remedy="Mend that; where there is no message, look at the disk and its permissions",
                )
            if self.pid() is not None and ready():
                return True
            if any(child["restarts"] >= FAILING for child in self.status()["processes"].values()):
                break
            time.sleep(0.2)
        return False

    def stop(self) -> bool:
        """End the service; what it was doing is ended, not finished.

        Returns:
            Whether it ran.

        Raises:
            UsageError: when it runs on another machine, or in another container: here its number is another process's.
            Unreachable: when it does not end.
        """
        runner = self._runner()
        if runner is None:
            return False
        pid, *machine = runner
        if machine != [_machine()]:
            raise UsageError(
                f"{self.what} runs on another machine or in another container",
                where=str(self.folder),
                remedy="Stop it there",
            )
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(int(pid), signal.SIGTERM)
        deadline = time.monotonic() + 2 * STOPPING_S
        while time.monotonic() < deadline:
            if self.pid() is None:
                return True
            time.sleep(0.1)
        raise Unreachable(f"{self.what} (process {pid}) does not end", remedy=f"End it with kill -9 {pid}")


def _machine() -> str:
    """Where a process number means one process: a machine's name, and its table of processes."""
    return f"{socket.gethostname()}/{os.readlink('/proc/self/ns/pid')}"


@contextlib.contextmanager
def _for_the_owner_alone() -> Iterator[None]:
    """Files that this process and its children make cannot be read by others."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


class _Supervisor:
    def __init__(
        self, service: Service, children: Sequence[Child], beside: Callable[[threading.Event], None] | None
    ) -> None:
        self._service, self._children, self._beside = service, children, beside
        self._over, self._lock = threading.Event(), threading.Lock()
        self._state: dict[str, dict[str, Any]] = {}

    def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._over.set())
        threads = [threading.Thread(target=self._keep, args=(child,)) for child in self._children]
        if self._beside is not None:
            threads.append(threading.Thread(target=self._beside, args=(self._over,), daemon=True))
        for thread in threads:
            thread.start()
        while not self._over.wait(0.5):
            pass
        for thread in threads:
            thread.join(timeout=STOPPING_S + 5)
        self._service.write_status({})

    def _keep(self, child: Child) -> None:
        """Start a process again and again."""
        log = _rotated(self._service.log_file(child.name))
        restarts = tries = 0
        while not self._over.is_set():
            begun = time.monotonic()
            try:
                code: int | None = self._once(child, log, restarts)
            except (OSError, RuntimeError) as error:  # no memory, or no process or thread more
                log.error("cannot be started: %s", error)
                code = None
            if self._over.is_set():
                break
            restarts += 1
            tries = 1 if time.monotonic() - begun > STEADY_S else tries + 1
            wait = DELAYS_S[min(tries, len(DELAYS_S)) - 1]
            log.warning("ended with code %s; starting again in %g s", code, wait)
            self._say(child, pid=None, state=f"waiting {wait:g} s to start again", restarts=restarts, last_exit=code)
            self._over.wait(wait)
        for handler in log.handlers:
            handler.close()

    def _once(self, child: Child, log: logging.Logger, restarts: int) -> int:
        """Run a process to its end, with its lines in the log."""
        process = subprocess.Popen(
            [sys.executable, "-m", "gapweave.shared.tether", *child.command],
            env={**own_environment(), **child.environment, "GAPWEAVE_SUPERVISOR": str(os.getpid())},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._say(child, pid=process.pid, state="running", restarts=restarts)
        reader = threading.Thread(target=_copy, args=(process, log), daemon=True)
        try:
            reader.start()
        except RuntimeError:
            _end(process)
            raise
        while process.poll() is None:
            if self._over.wait(0.2):
                _end(process)
        _kill_group(process)  # what it started, and left behind
        reader.join(timeout=2)
        return int(process.returncode)

    def _say(self, child: Child, **state: Any) -> None:
        with self._lock:
            last = self._state.get(child.name, {})
            self._state[child.name] = {
                "last_exit": last.get("last_exit"),
                "since": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                **state,
            }
            self._service.write_status(self._state)


def _copy(process: subprocess.Popen[str], log: logging.Logger) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        log.info("%s", COLOURS.sub("", line).rstrip())


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(timeout=STOPPING_S)
    except subprocess.TimeoutExpired:
        _kill_group(process)
        process.wait()


def _kill_group(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _rotated(path: Path) -> logging.Logger:
    """A log that grows to a bounded size, readable by its owner only; a full disk loses lines, not the service."""
    handler = RotatingFileHandler(path, maxBytes=LOG_BYTES, backupCount=LOG_FILES, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    handler.handleError = lambda record: None  # type: ignore[method-assign]
    log = logging.Logger(str(path))
    log.addHandler(handler)
    return log
