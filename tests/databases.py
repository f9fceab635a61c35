"""Databases for tests: a PostgreSQL cluster of one's own, and tables filled from frames."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import sqlalchemy as sa

from gapweave.shared.ports import free_port

PASSWORD = "correct horse:@/%"
"""Of both users, with what a URL would have to escape."""


@dataclass(frozen=True, kw_only=True)
class Postgres:
    """A running cluster. Its user `owner` may do everything, `reader` may read what is granted to it."""

    port: int
    folder: Path

    def socket_url(self, user: str, database: str) -> str:
        """The same by its socket, which other network namespaces reach, too."""
        return f"postgresql+psycopg://{user}@/{database}?host={self.folder}&port={self.port}"

    def url(self, user: str, database: str = "postgres") -> str:
        """As a site file has it: without a password."""
        return f"postgresql+psycopg://{user}@127.0.0.1:{self.port}/{database}"

    def engine(self, database: str = "postgres", user: str = "owner") -> sa.Engine:
        url = sa.make_url(self.url(user, database)).set(password=PASSWORD)
        return sa.create_engine(url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")

    def create(self, database: str) -> sa.Engine:
        """A new database whose tables, once filled, `reader` may read."""
        with self.engine().connect() as connection:
            connection.execute(sa.text(f'CREATE DATABASE "{database}"'))
        engine = self.engine(database)
        with engine.connect() as connection:
            connection.execute(sa.text("ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO reader"))
            connection.execute(sa.text("ALTER DEFAULT PRIVILEGES GRANT USAGE ON SCHEMAS TO reader"))
        return engine


def programs() -> Path | None:
    """The folder of initdb and postgres; Debian keeps them off the PATH."""
    found = shutil.which("initdb")
    folders = [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return folders[-1] if folders else None


@contextmanager
def running_postgres() -> Iterator[Postgres]:
    """A cluster on loopback, in a temporary folder, that ends with the block; skips where PostgreSQL is missing."""
    folder = programs()
    if folder is None:
        message = "PostgreSQL is not installed: `make setup-system` installs it"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
    assert folder is not None
    base = Path(tempfile.mkdtemp(prefix="postgres-"))
    # It refuses to run as root.
    account = pwd.getpwnam("postgres" if _known("postgres") else "nobody") if os.getuid() == 0 else None
    user: dict[str, Any] = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []} if account else {}
    if account is not None:
        os.chown(base, account.pw_uid, account.pw_gid)
    secret = base / "password"
    secret.write_text(PASSWORD)
    secret.chmod(0o644)
    port = free_port()
    init = [
        "-D",
        str(base / "data"),
        "-U",
        "owner",
        "-A",
        "scram-sha-256",
        f"--pwfile={secret}",
        "--no-sync",
        "-E",
        "UTF8",
    ]
    subprocess.run([str(folder / "initdb"), *init], check=True, capture_output=True, cwd=base, **user)
    options = ["-D", str(base / "data"), "-k", str(base), "-h", "127.0.0.1", "-p", str(port), "-c", "fsync=off"]
    with (base / "log").open("wb") as log:
        server = subprocess.Popen([str(folder / "postgres"), *options], stdout=log, stderr=log, cwd=base, **user)
    cluster = Postgres(port=port, folder=base)
    try:
        _wait(cluster, server)
        with cluster.engine().connect() as connection:
            word = PASSWORD.replace(":", r"\:")
            connection.execute(sa.text(f"CREATE ROLE reader LOGIN PASSWORD '{word}'"))
        yield cluster
    finally:
        server.send_signal(signal.SIGQUIT)
        server.wait(30)
        shutil.rmtree(base)


def _known(user: str) -> bool:
    return any(entry.pw_name == user for entry in pwd.getpwall())


def _wait(cluster: Postgres, server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            with cluster.engine().connect():
                return
        except sa.exc.OperationalError:
            if time.monotonic() > end or server.poll() is not None:
                raise
            time.sleep(0.1)


TYPES = {
    pl.String: sa.Text,
    pl.Int64: sa.BigInteger,
    pl.Float64: sa.Double,
    pl.Datetime("us"): sa.DateTime,
    pl.Date: sa.Date,
}


def fill(engine: sa.Engine, frames: Mapping[str, pl.DataFrame], schema: str | None = None) -> None:
    """Create a table for each frame, with its rows."""
    meta = sa.MetaData(schema=schema)
    tables = {
        name: sa.Table(name, meta, *(sa.Column(column, TYPES[kind]()) for column, kind in frame.schema.items()))
        for name, frame in frames.items()
    }
    with engine.begin() as connection:
        if schema is not None:
            connection.execute(sa.schema.CreateSchema(schema))
        meta.create_all(connection)
        for name, frame in frames.items():
            if len(frame):
                connection.execute(tables[name].insert(), frame.to_dicts())
