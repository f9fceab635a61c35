"""The hub's folder: certificates, configuration, registered sites, runs. Everything that `server init` makes.

HUB/hub.yaml            name, hosts, ports
HUB/connection.yaml     for the hospitals; nothing in it is secret
HUB/ca.crt, ca.key      the hub's own authority; HUB/server.crt, server.key  what it shows to sites
HUB/nginx.conf          the reverse proxy: the only thing that listens beyond this machine
HUB/keys/NAME.pub       public keys of sites;  HUB/sites.json  their numbers in the SuperLink
HUB/runs/RUN            run directories;  HUB/submitted/RUN.json  what was submitted
HUB/superlink.db        Flower's database;  HUB/service  lock, status and logs
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from platformdirs import user_config_path
from pydantic import Field

from gapweave.server.certificates import RENEW_DAYS, days_left, make_authority, make_server_certificate
from gapweave.server.proxy import proxy_configuration
from gapweave.shared.config.base import SiteName, StrictModel, parse, read_yaml
from gapweave.shared.config.study import Version
from gapweave.shared.errors import UsageError
from gapweave.shared.files import private_folder, write_atomically
from gapweave.shared.service import Service

PORT = 9092
"""Where sites connect to; the SuperLink and its health server listen on the two after the proxy's, on loopback."""


Host = Annotated[str, Field(pattern=r"^[A-Za-z0-9:]([A-Za-z0-9.:_-]*[A-Za-z0-9:])?$", max_length=253)]
"""A name or address of a machine."""


class HubConfig(StrictModel):
    """hub.yaml."""

    version: Version = Field(description="format of the file: 1")
    name: str = Field(pattern=SiteName, description="name of the hub")
    hosts: list[Host] = Field(min_length=1, description="names and addresses of this machine, the first for the sites")
    port: int = Field(PORT, ge=1, le=65535, description="public port, that sites connect to")
    listen_port: int | None = Field(
        None, ge=1, le=65535, description="port of the reverse proxy, where a router brings the public one there"
    )
    control_port: int = Field(PORT + 1, ge=1, le=65535, description="port of the SuperLink, on loopback only")
    health_port: int = Field(PORT + 2, ge=1, le=65535, description="port of its health server, on loopback only")


class Hub:
    """A hub's folder.

    Args:
        folder: as `create` or `find` gives it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.config = parse(HubConfig, read_yaml(self.folder / "hub.yaml", "hub"), str(folder / "hub.yaml"))
        self.ca, self.certificate, self.key = (self.folder / name for name in ("ca.crt", "server.crt", "server.key"))
        self.connection = self.folder / "connection.yaml"
        self.database = self.folder / "superlink.db"
        self.runs, self._submitted = self.folder / "runs", self.folder / "submitted"
        self.keys, self.registry = self.folder / "keys", self.folder / "sites.json"
        self.proxy = self.folder / "nginx.conf"
        self.service = Service(self.folder / "service", f"the hub {self.config.name}")

    @property
    def listens(self) -> int:
        """Port of the reverse proxy."""
        return self.config.listen_port or self.config.port

    @classmethod
    def create(cls, folder: Path, name: str, hosts: Sequence[str], port: int, listen_port: int | None = None) -> Hub:
        """Make a hub and enter it in the user's list of servers.

        Args:
            folder: to make.
            name: of the hub.
            hosts: names and addresses, the first for the sites.
            port: that sites connect to.
            listen_port: that the reverse proxy listens on, if it is another one.

        Raises:
            UsageError: when there is one already, or for a name that is none.
        """
        if (folder / "hub.yaml").exists():
            raise UsageError("there is a hub already", where=str(folder), remedy="Start it, or give another --dir")
        if not re.fullmatch(SiteName, name):
            raise UsageError(
                f"{name!r} is no name for a hub", where="--name", remedy="Use letters, digits, '-' and '_'"
            )
        own = listen_port or port
        content = {
            "version": 1,
            "name": name,
            "hosts": list(hosts),
            "port": port,
            "listen_port": listen_port,
            "control_port": own + 1,
            "health_port": own + 2,
        }
        parse(HubConfig, content, "--host")
        private_folder(folder)
        folder.chmod(0o700)
        for part in ("keys", "runs", "submitted", "flower"):
            private_folder(folder / part)
        make_authority(folder / "ca.crt", folder / "ca.key", name)
        write_atomically(folder / "hub.yaml", yaml.safe_dump(content, sort_keys=False).encode())
        hub = cls(folder)
        hub.renew(force=True)
        _enter(name, hub.folder)
        return hub

    @classmethod
    def find(cls, name: str | None, option: str = "--server") -> Hub:
        """A hub by its name in the user's list, or by its folder.

        Args:
            name: None: that of GAPWEAVE_HUB, or ./hub, or the only one in the list.
            option: by which it was given, for messages.

        Raises:
            UsageError: when there is none.
        """
        if name is None:
            place, entered = Path(os.environ.get("GAPWEAVE_HUB", "hub")), list(_entered().values())
            only = len(entered) == 1 and not (place / "hub.yaml").exists() and "GAPWEAVE_HUB" not in os.environ
            return cls._at(Path(entered[0]) if only else place, "--dir")
        listed = _entered().get(name)
        if listed is not None and (Path(listed) / "hub.yaml").exists():
            return cls(Path(listed))
        return cls._at(Path(name), option)

    @classmethod
    def _at(cls, folder: Path, option: str) -> Hub:
        if not (folder / "hub.yaml").exists():
            known = ", ".join(sorted(_entered())) or "none"
            raise UsageError(
                f"there is no hub {str(folder)!r}",
                where=option,
                remedy=f"Make one with `gapweave server init`; hubs of this user: {known}",
            )
        return cls(folder)

    def renew(self, *, force: bool = False) -> None:
        """Write what follows from hub.yaml, and a new certificate when the old one ends soon."""
        names = self.config.hosts
        if force or not self.certificate.exists() or days_left(self.certificate) < RENEW_DAYS:
            make_server_certificate(self.ca, self.folder / "ca.key", names, self.certificate, self.key)
        head = {"version": 1, "name": self.config.name, "host": names[0], "port": self.config.port}
        authority = "".join(f"  {line}\n" for line in self.ca.read_text().splitlines())
        text = f"{yaml.safe_dump(head, sort_keys=False)}ca: |\n{authority}"
        write_atomically(self.connection, text.encode())
        self.connection.chmod(0o644)
        text = proxy_configuration(port=self.listens, control_port=self.config.control_port)
        write_atomically(self.proxy, text.encode())

    def add_site(self, name: str, key: Path) -> None:
        """Let a site in, by its public key; a running hub takes it up at once.

        Raises:
            UsageError: for a name that is none or taken, or a file that holds no public key.
        """
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.serialization import load_ssh_public_key

        if not re.fullmatch(SiteName, name):
            raise UsageError(f"{name!r} is no name of a site", where="NAME", remedy="Give the `name` of its site file")
        if not key.exists():
            raise UsageError("there is no such file", where=str(key), remedy="`gapweave site init` makes site.pub")
        content = key.read_bytes()
        if b"PRIVATE KEY" in content:
            raise UsageError(
                "this is a private key", where=str(key), remedy="It must not leave the hospital: ask for the .pub file"
            )
        try:
            public = load_ssh_public_key(content)
        except Exception:  # of several kinds, by what the file holds
            public = None
        if not (isinstance(public, ec.EllipticCurvePublicKey) and public.curve.name in ("secp256r1", "secp384r1")):
            raise UsageError(
                "this is no public key of a site", where=str(key), remedy="`gapweave site init` makes site.pub"
            )
        for other in self.sites():
            if other != name and _same_key(content, (self.keys / f"{other}.pub").read_bytes()):
                raise UsageError(
                    f"this is the key of {other!r}",
                    where=str(key),
                    remedy=f"Each site has its own; to rename one, first: gapweave server remove-site {other}",
                )
        file = self.keys / f"{name}.pub"
        if file.exists() and not _same_key(content, file.read_bytes()):
            raise UsageError(
                f"the hub has another key of {name!r}",
                where=str(file),
                remedy=f"If the site has a new key, first: gapweave server remove-site {name}",
            )
        write_atomically(file, content)

    def remove_site(self, name: str) -> None:
        """Let a site in no more; a running hub takes it up at once.

        Raises:
            UsageError: when there is none of that name.
        """
        file = self.keys / f"{name}.pub"
        if not file.exists():
            raise UsageError(f"there is no site {name!r}", where=str(self.keys), remedy=f"Sites: {self.sites()}")
        file.unlink()

    def sites(self) -> list[str]:
        """Names of the sites that are let in."""
        return sorted(file.stem for file in self.keys.glob("*.pub"))

    def registered(self) -> dict[str, int]:
        """Numbers that Flower gave to sites, by name."""
        try:
            found: dict[str, int] = json.loads(self.registry.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # damaged: it is written again
            return {}
        return found

    def write_registered(self, numbers: dict[str, int]) -> None:
        """Keep the numbers of sites: a run reads them to know who a message is from."""
        write_atomically(self.registry, json.dumps(numbers, indent=1).encode())

    def note(self, run: str, content: dict[str, Any]) -> None:
        """Keep what was submitted as a run."""
        write_atomically(self._submitted / f"{run}.json", json.dumps(content, indent=1).encode())

    def noted(self) -> dict[str, dict[str, Any]]:
        """All submitted runs, the oldest first."""
        files = self._submitted.glob("*.json")
        found = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
        return dict(sorted(found.items(), key=lambda item: str(item[1]["submitted"])))


def _same_key(one: bytes, other: bytes) -> bool:
    """Whether two lines of OpenSSH hold one key, whatever comment follows it."""
    return one.split()[:2] == other.split()[:2]


def folder_called(name: str) -> Path | None:
    """Folder of the hub that has a name in the user's list, if it is still there."""
    folder = Path(_entered().get(name, ""))
    return folder if (folder / "hub.yaml").exists() and name in _entered() else None


def _list_file() -> Path:
    return user_config_path("gapweave") / "servers.json"


def _entered() -> dict[str, str]:
    file = _list_file()
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _enter(name: str, folder: Path) -> None:
    file = _list_file()
    private_folder(file.parent)
    write_atomically(file, json.dumps({**_entered(), name: str(folder)}, indent=1).encode())
