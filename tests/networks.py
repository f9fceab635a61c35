"""Hosts of one federation as network namespaces: each its own address, a logging resolver, no way out."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

PREFIX = "10.77.0."
NAMES = Path("/etc/netns")
RESOLVER = Path(__file__).parent / "resolver.py"


def available() -> bool:
    """Whether this machine lets us make network namespaces."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    made = subprocess.run(["ip", "netns", "add", "gapweave-probe"], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "del", "gapweave-probe"], capture_output=True, check=False)
    return made.returncode == 0


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


class Network:
    """Hosts on one switch, `hub.test` among them.

    Args:
        hosts: names; the first has the switch and the address .1.
        folder: for the resolvers' logs.
    """

    def __init__(self, hosts: Sequence[str], folder: Path) -> None:
        self.hosts, self._folder = list(hosts), folder
        self._tag = f"gw{os.getpid() % 10_000}"
        self._resolvers: list[subprocess.Popen[bytes]] = []

    def namespace(self, host: str) -> str:
        return f"{self._tag}-{host}"

    def address(self, host: str) -> str:
        return f"{PREFIX}{self.hosts.index(host) + 1}"

    def __enter__(self) -> Network:
        try:
            self._open()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _open(self) -> None:
        hub = self.namespace(self.hosts[0])
        for host in self.hosts:
            ip("netns", "add", self.namespace(host))
            ip("-n", self.namespace(host), "link", "set", "lo", "up")
        ip("-n", hub, "link", "add", "switch", "type", "bridge")
        ip("-n", hub, "addr", "add", f"{PREFIX}1/24", "dev", "switch")
        ip("-n", hub, "link", "set", "switch", "up")
        for number, host in enumerate(self.hosts[1:]):
            own = self.namespace(host)
            ip("link", "add", f"p{number}", "netns", hub, "type", "veth", "peer", "name", "eth0", "netns", own)
            ip("-n", hub, "link", "set", f"p{number}", "master", "switch", "up")
            ip("-n", own, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
            ip("-n", own, "link", "set", "eth0", "up")
        for host in self.hosts:
            files = NAMES / self.namespace(host)
            files.mkdir(parents=True)
            (files / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
            (files / "hosts").write_text("127.0.0.1 localhost\n")
            (files / "nsswitch.conf").write_text("hosts: files dns\n")
            names = f"hub.test={PREFIX}1"
            command = [sys.executable, str(RESOLVER), str(self.asked_file(host)), names]
            self._resolvers.append(self.start(host, command))

    def __exit__(self, *_: object) -> None:
        for process in self._resolvers:
            process.kill()
            process.wait()
        for host in self.hosts:
            name = self.namespace(host)
            pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout
            for pid in pids.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), 9)
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
            shutil.rmtree(NAMES / name, ignore_errors=True)

    def asked_file(self, host: str) -> Path:
        return self._folder / f"{host}.asked"

    def asked(self, host: str) -> set[str]:
        """Names that a host asked for."""
        file = self.asked_file(host)
        return set(file.read_text().split()) if file.exists() else set()

    def start(self, host: str, command: Sequence[str], **keywords: object) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["ip", "netns", "exec", self.namespace(host), *command], **keywords)  # type: ignore[call-overload,no-any-return]

    def run(
        self, host: str, command: Sequence[str], environment: dict[str, str] | None = None, seconds: float = 120
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["ip", "netns", "exec", self.namespace(host), *command],
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )

    def cut(self, host: str) -> None:
        """Packets to the hub vanish, as behind a firewall that drops."""
        ip("-n", self.namespace(host), "route", "add", "blackhole", f"{PREFIX}1/32")

    def mend(self, host: str) -> None:
        ip("-n", self.namespace(host), "route", "del", "blackhole", f"{PREFIX}1/32")

    def cut_for(self, host: str, seconds: float) -> threading.Timer:
        self.cut(host)
        timer = threading.Timer(seconds, self.mend, (host,))
        timer.start()
        return timer
