"""The connection file: what a hub gives to its hospitals. It holds nothing secret."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from gapweave.shared.config.base import StrictModel, parse, read_yaml
from gapweave.shared.config.study import Version


class Connection(StrictModel):
    """Where a hub is, and by which certificate it is known."""

    version: Version = Field(description="format of the file: 1")
    name: str = Field(description="name of the hub")
    host: str = Field(pattern=r"^[A-Za-z0-9.:-]+$", description="host name or address that sites connect to")
    port: int = Field(ge=1, le=65535, description="the one outbound port that a site needs")
    ca: str = Field(description="certificate of the hub's own authority, PEM")

    @property
    def address(self) -> str:
        """Host and port, as Flower takes them."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def load_connection(path: Path) -> Connection:
    """Read a connection file.

    Raises:
        UsageError: naming file, key and remedy.
    """
    return parse(Connection, read_yaml(path, "connection"), str(path))
